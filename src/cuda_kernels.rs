//! Every CUDA kernel of the crate against the table of what it takes.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use crate::engine::cuda::resources::{Table, compiler, examine};
use crate::engine::cuda::{KernelKey, WriteKey};

/// Where it is kept.
const TABLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/shaders/cuda/resources.txt");

fn keys() -> Vec<Box<dyn KernelKey>> {
    let mut keys: Vec<Box<dyn KernelKey>> = vec![Box::new(WriteKey)];
    keys.extend(crate::socket::cuda::test_keys());
    keys.extend(crate::race::cuda::test_keys());
    keys
}

#[test]
fn labels_tell_kernels_apart() {
    let mut labels: Vec<_> = keys().iter().map(|key| key.label()).collect();
    let all = labels.len();
    labels.sort_unstable();
    labels.dedup();
    assert_eq!(labels.len(), all);
    assert!(labels.iter().all(|label| !label.contains(['|', '\n'])));
}

#[test]
fn every_kernel_compiles_for_every_gpu_and_takes_what_it_took() {
    let Some(version) = compiler() else { return };
    let kept = Table::parse(&std::fs::read_to_string(TABLE).unwrap_or_default());
    let keys = keys();
    let (wrong, now) = examine(&version, &keys, &kept);
    if std::env::var_os("SOFTHASH_BLESS").is_some() {
        // What does not compile has no line, and nothing would miss it later.
        assert!(now.has_all_of(&keys), "{}", wrong.join("\n"));
        std::fs::write(TABLE, now.text()).unwrap();
        return;
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
