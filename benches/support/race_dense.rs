//! Exact attention beside RACE.

use super::counter::Part;
use super::race_layer::{HEAD, Size, Tensors};
use super::race_record::Record;
use super::race_truth::{self, At};
use softhash::{CacheShape, Device, SocketCache, SocketConfig, Tensor};

/// Seconds of exact causal attention over the same tensors, the keys being in the cache already.
pub fn dense(device: &Device, tensors: &Tensors, measure: impl FnOnce(Record, &mut dyn FnMut()) -> f64) -> f64 {
    let Size { heads, channels, dtype, .. } = tensors.size;
    let shape = CacheShape { num_q_heads: heads, num_kv_heads: heads, head_dim: channels, value_dim: channels, dtype };
    let mut cache = SocketCache::new(device, SocketConfig::fast(), shape, 1).unwrap();
    let [q, k, v, _] = tensors.views();
    cache.append(&k, &v).unwrap();
    check_dense(tensors, &cache.prefill(&q).unwrap().o);
    let record = Record::new("dense", "forward", &tensors.size, 0);
    measure(record, &mut || {
        cache.prefill(&q).unwrap();
    })
}

/// Compares the last token of one head with a softmax in f64.
fn check_dense(tensors: &Tensors, o: &Tensor) {
    let Size { tokens, channels, dtype, .. } = tensors.size;
    let row = |part, token| {
        let mut row = vec![0.0; channels];
        tensors.counter.row(part, token, HEAD, &mut row);
        row
    };
    let q = row(Part::Q, tokens - 1);
    let (mut sum, mut truth) = (0.0, vec![0.0; channels]);
    for token in 0..tokens {
        let logit: f64 = row(Part::K, token).iter().zip(&q).map(|(k, q)| k * q).sum();
        let weight = (logit / (channels as f64).sqrt()).exp();
        sum += weight;
        truth.iter_mut().zip(row(Part::V, token)).for_each(|(t, v)| *t += weight * v);
    }
    truth.iter_mut().for_each(|t| *t /= sum);
    let mut found = [At { token: tokens - 1, ..At::default() }];
    race_truth::note(&mut found, HEAD, &(0..tokens), o, |at| &mut at.o).unwrap();
    let error = race_truth::error(&found[0].o, &truth);
    assert!(
        error < race_truth::tolerance(dtype),
        "dense over {tokens} tokens is off by {error:.1e}: no times are taken"
    );
}
