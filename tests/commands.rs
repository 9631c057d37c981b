//! The example commands as a script sees them: exit codes and lines. `cargo test` builds them beside this test.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::process::Command;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(format!("{name}.safetensors"))
}

/// Exit code and standard output of `conformance --device DEVICE FILES`.
fn conformance(device: &str, files: &[&Path]) -> (i32, String) {
    // target/PROFILE/deps/this-test -> target/PROFILE/examples/conformance
    let profile = std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().to_path_buf();
    let program = profile.join("examples").join(format!("conformance{}", std::env::consts::EXE_SUFFIX));
    assert!(program.exists(), "{} is missing: run `cargo build --examples`", program.display());
    let output = Command::new(program).args(["--device", device]).args(files).output().unwrap();
    (output.status.code().unwrap(), String::from_utf8(output.stdout).unwrap())
}

#[test]
fn conformance_tells_the_outcome_by_its_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    let good = fixture("hash_p2l2_d64");
    let (code, lines) = conformance("cpu", &[&good]);
    assert_eq!(code, 0, "{lines}");
    // One line per checked tensor: name, error, bound, verdict.
    let checked: Vec<_> = lines.lines().filter(|l| l.starts_with("hash_p2l2_d64: ")).collect();
    assert!(checked.len() > 4 && checked.iter().all(|l| l.ends_with(" pass")), "{lines}");
    assert!(checked.iter().all(|l| l.contains(" error ") && l.contains(" bound ")), "{lines}");

    // The last number of the file is a code; its lowest bit.
    let mut bytes = std::fs::read(&good).unwrap();
    let at = bytes.len() - 4;
    bytes[at] ^= 1;
    let planted = folder.path().join("planted.safetensors");
    std::fs::write(&planted, &bytes).unwrap();
    let (code, lines) = conformance("cpu", &[&good, &planted]);
    assert_eq!(code, 1, "{lines}");
    assert!(lines.lines().any(|l| l.starts_with("planted: ") && l.ends_with(" FAIL")), "{lines}");

    let cut = folder.path().join("cut.safetensors");
    std::fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();
    let unknown = folder.path().join("unknown.safetensors");
    std::fs::write(&unknown, [&2u64.to_le_bytes()[..], b"{}"].concat()).unwrap();
    for unreadable in [cut, unknown, folder.path().join("absent.safetensors")] {
        let (code, lines) = conformance("cpu", &[&good, &unreadable]);
        assert_eq!(code, 2, "{lines}");
        assert!(lines.contains(" pass") && lines.contains("unreadable: "), "the other files are judged still: {lines}");
    }
    assert_eq!(conformance("no such adapter", &[&good]).0, 2);
    // A failure counts for more than an unreadable file.
    assert_eq!(conformance("cpu", &[&planted, &folder.path().join("absent.safetensors")]).0, 1);

    let (code, lines) = conformance("cpu", &[&good, &fixture("race_decode_d64_p3l3")]);
    assert_eq!(code, if lines.contains(": unsupported: ") { 3 } else { 0 }, "{lines}");
}
