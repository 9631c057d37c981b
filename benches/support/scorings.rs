//! Names of what decodes.

use softhash::{Scoring, SelectionScope, SocketConfig};

/// The configuration that `name` runs; `dense` has one too, for its cache.
pub fn config(name: &str) -> Option<SocketConfig> {
    Some(match name {
        "dense" | "socket" => SocketConfig::paper(),
        "sign128" => SocketConfig::fast(),
        "sign128-group" => SocketConfig { scope: SelectionScope::PerGroup, ..SocketConfig::fast() },
        "hard" => SocketConfig { scoring: Scoring::HardCollision, ..SocketConfig::paper() },
        _ => return None,
    })
}
