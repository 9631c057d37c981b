//! The names that `--scoring` takes, and the configuration behind each.

use softhash::{Budget, Mode, Rule, Scoring, SocketConfig};

use crate::{Result, fail};

/// The names, for help and errors.
pub const NAMES: &str = "dense, socket, socket-p10, socket-no-vnorm, signN (N bits, such as sign128), hard, hard-vnorm, \
                         hamming";

/// What `--scoring` leaves open.
#[derive(Clone, Copy, Debug)]
pub struct Budgets {
    /// Share of the keys attended, with sink and window.
    pub ratio: f32,
    /// First tokens, always attended.
    pub sink: usize,
    /// Last tokens, always attended.
    pub window: usize,
}

/// One way of attending.
#[derive(Clone, Debug)]
pub struct Selector {
    /// As it was named on the command line.
    pub name: String,
    /// Which attention decoding runs.
    pub mode: Mode,
    /// Configuration of its caches.
    pub config: SocketConfig,
}

impl Selector {
    /// The selector called `name`.
    pub fn named(name: &str, budgets: Budgets) -> Result<Self> {
        let paper = SocketConfig::paper();
        // What is not the published method takes the disjoint rule and leaves ‖v‖ out.
        let plain = SocketConfig { rule: Rule::Disjoint, value_norm: false, ..paper.clone() };
        let hard = SocketConfig { scoring: Scoring::HardCollision, ..plain.clone() };
        let (mode, config) = match name {
            // Dense attention reads no index.
            "dense" => (Mode::Dense, SocketConfig::sign_projection(8)),
            "socket" => (Mode::Sparse, paper),
            "socket-p10" => (Mode::Sparse, SocketConfig { planes: 10, ..paper }),
            "socket-no-vnorm" => (Mode::Sparse, plain),
            "hard" => (Mode::Sparse, hard),
            "hard-vnorm" => (Mode::Sparse, SocketConfig { value_norm: true, ..hard }),
            "hamming" => (Mode::Sparse, SocketConfig { scoring: Scoring::Hamming, ..plain }),
            _ => match name.strip_prefix("sign").and_then(|bits| bits.parse().ok()) {
                Some(bits) if !usize::is_multiple_of(bits, 8) => {
                    return fail(format!("--scoring {name}: the bits of a sign projection must be a multiple of 8"));
                }
                Some(bits) => (Mode::Sparse, SocketConfig::sign_projection(bits)),
                None => return fail(format!("--scoring {name:?} is not known; there are {NAMES}")),
            },
        };
        let Budgets { ratio, sink, window } = budgets;
        let config = SocketConfig { budget: Budget::Ratio(ratio), sink, window, ..config };
        config.validate().map_err(|e| format!("{name}: {e}"))?;
        Ok(Self { name: name.to_string(), mode, config })
    }
}
