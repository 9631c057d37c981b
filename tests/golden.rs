//! Every golden case on every path, by the code of the conformance example.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "common/device.rs"]
mod device;
#[path = "../examples/conformance/suite/mod.rs"]
mod suite;

use softhash::Device;
use std::path::{Path, PathBuf};
use suite::{
    Check,
    fixture::{Failure, Fixture},
};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn case(name: &str) -> Fixture {
    Fixture::read(&folder().join(format!("{name}.safetensors"))).unwrap()
}

fn checks(device: &Device, case: &Fixture) -> Vec<Check> {
    suite::judge(device, case).unwrap_or_else(|e| panic!("{}: {e}", case.name))
}

/// Judges all cases of the folder and counts them.
fn judge_all(device: &Device) {
    let (mut judged, mut failures) = (0, Vec::new());
    for entry in std::fs::read_dir(folder()).unwrap() {
        let path = entry.unwrap().path();
        let stem = path.file_stem().unwrap().to_str().unwrap();
        if path.extension().is_none_or(|e| e != "safetensors") || stem.ends_with("_kv") || stem.ends_with("_in") {
            continue;
        }
        let case = Fixture::read(&path).unwrap();
        let checks = checks(device, &case);
        judged += 1;
        assert!(checks.len() > 4, "{stem}: only {} checks", checks.len());
        failures.extend(checks.iter().filter(|c| !c.passes()).map(Check::to_string));
    }
    assert_eq!(judged, 33, "cases judged");
    assert!(failures.is_empty(), "{}\n{}", device.report(), failures.join("\n"));
}

#[test]
fn golden_cases_pass_on_the_cpu() {
    judge_all(&Device::cpu());
}

#[cfg(feature = "wgpu")]
#[test]
fn golden_cases_pass_on_the_gpu() {
    judge_all(&device::gpu());
}

/// One wrong number in any expected tensor must be found, and found there.
#[test]
fn planted_errors_are_found() {
    let outputs = ["out_union", "out_disjoint", "out_dense"];
    let socket = ["codes", "vnorm", "scores", "scores_no_vnorm", "sel_union", "sel_disjoint"];
    let sign = ["mu", "vbar", "bits", "scale", "est_logits", "est_var", "tail_mass", "selected"];
    let race = ["out", "AT", "BT", "dq", "dk", "dv", "dplanes", "dbeta", "dA0", "dB0"];
    let sign_outputs = ["out_selected_only", "out_tail_corrected", "out_dense"];
    let cases = [
        ("hash_p3l3_d96", vec!["codes", "phi"]),
        ("socket_nosink_t64", [&outputs[..], &socket].concat()),
        ("extra_signlinear_d64", [&sign[..], &sign_outputs].concat()),
        ("race_t33_d64_p2l2_nostate_saturated_ratio_causal", race.to_vec()),
        ("race_decode_d64_p3l3", vec!["AT", "BT", "A_prefix", "B_prefix", "out_ratio", "out_bucket_mean"]),
    ];
    for (name, tensors) in cases {
        let sound = case(name);
        assert!(checks(&Device::cpu(), &sound).iter().all(Check::passes), "{name} fails as it is");
        for tensor in tensors {
            let mut planted = sound.clone();
            let data = &mut planted.tensors.get_mut(tensor).unwrap().data;
            let whole = data.iter().all(|x| x.fract() == 0.0);
            let largest = data.iter().map(|x| x.abs()).fold(0.0, f64::max);
            if whole {
                data[0] = if data[0] == 0.0 { 1.0 } else { data[0] - 1.0 };
            } else {
                data[0] += largest * 1e-4;
            }
            let found = checks(&Device::cpu(), &planted);
            let red = found.iter().filter(|c| c.name.contains(&format!(": {tensor} ")));
            assert!(red.clone().any(|c| !c.passes()), "{name}: an error planted in {tensor} is not found");
        }
    }
}

#[test]
fn numbers_that_are_not_finite_fail() {
    let mut planted = case("socket_nosink_t64");
    planted.tensors.get_mut("out_dense").unwrap().data[5] = f64::NAN;
    let found = checks(&Device::cpu(), &planted);
    assert_eq!(found.iter().filter(|c| !c.passes()).count(), 2, "{found:?}");
}

#[test]
fn files_of_no_known_kind_are_refused() {
    let mut unknown = case("hash_p2l2_d64");
    unknown.tensors.remove("phi");
    assert!(matches!(suite::judge(&Device::cpu(), &unknown), Err(Failure::File(_))));

    let mut misshapen = case("hash_p2l2_d64");
    misshapen.tensors.get_mut("x").unwrap().shape = vec![64, 9];
    assert!(matches!(suite::judge(&Device::cpu(), &misshapen), Err(Failure::File(_))));

    let cut = tempfile::tempdir().unwrap();
    let path = cut.path().join("hash_cut.safetensors");
    let bytes = std::fs::read(folder().join("hash_p2l2_d64.safetensors")).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 9]).unwrap();
    assert!(matches!(Fixture::read(&path), Err(Failure::File(_))));
    assert!(matches!(Fixture::read(&cut.path().join("absent.safetensors")), Err(Failure::File(_))));
}
