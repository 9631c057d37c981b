//! NVIDIA drivers that cannot be used: made up for the test, so that it runs on every machine.

use super::*;
use std::process::Command;

/// A driver of our own that answers as it is told; `broken` leaves its functions out.
fn made_up_driver(folder: &std::path::Path, init: i32, version: i32, devices: i32, broken: bool) {
    let text = format!(
        "int made_up; \n#if !{}\n\
         int cuInit(unsigned flags) {{ return {init}; }}\n\
         int cuDriverGetVersion(int* version) {{ *version = {version}; return 0; }}\n\
         int cuDeviceGetCount(int* count) {{ *count = {devices}; return 0; }}\n\
         int cuDeviceGet(int* device, int ordinal) {{ *device = ordinal; return 0; }}\n\
         int cuDeviceGetName(char* name, int length, int device) {{ name[0] = 'X'; name[1] = 0; return 0; }}\n\
         int cuGetErrorString(int error, const char** text) {{ *text = \"a made-up reason\"; return 0; }}\n\
         #endif\n",
        i32::from(broken)
    );
    let source = folder.join("driver.c");
    std::fs::write(&source, text).unwrap();
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-o"]).arg(folder.join("libcuda.so")).arg(&source);
    // Rust links with it, so it is there.
    assert!(compiler.status().unwrap().success());
}

#[test]
fn drivers_that_cannot_be_used_say_so_in_one_line() {
    use softhash::cudarc::nvrtc::sys::is_culib_present;
    // SAFETY: looks whether the library can be loaded.
    let has_nvrtc = unsafe { is_culib_present() };
    let cases = [
        (100, 13000, 0, false, "the NVIDIA driver sees no device"),
        (0, 13000, 0, false, "the NVIDIA driver sees no device"),
        (34, 13000, 1, false, "its library is the toolkit's stub"),
        (803, 13000, 1, false, "cannot be used: a made-up reason (CUDA_ERROR_SYSTEM_DRIVER_MISMATCH)"),
        (0, 0, 0, true, "cannot be used: its library has no cuInit"),
        (0, 11080, 1, false, "the CUDA version of the NVIDIA driver is 11.8, the kernels need at least 12.0"),
        (
            0,
            12020,
            1,
            false,
            if has_nvrtc { "at most 12.x, as the NVIDIA driver is of CUDA 12.2" } else { "NVRTC is missing" },
        ),
    ];
    let path = std::env::var("LD_LIBRARY_PATH").unwrap_or_default();
    for (init, version, devices, broken, expected) in cases {
        let folder = tempfile::tempdir().unwrap();
        made_up_driver(folder.path(), init, version, devices, broken);
        let path = format!("{}:{path}", folder.path().display());
        let output = cuda::run_alone("drivers::opened", &[("LD_LIBRARY_PATH", &path)]);
        let [out, err] = cuda::texts(&output);
        assert!(output.status.success() && !err.contains("panicked"), "{out}\n{err}");
        let line = out.lines().find_map(|line| line.split_once("cuda: ")).map_or("", |(_, line)| line);
        println!("{line}");
        assert!(line.contains(expected), "{expected:?} is not in {out}");
    }
}

#[test]
#[ignore = "run by drivers_that_cannot_be_used_say_so_in_one_line"]
fn opened() {
    println!("cuda: {}", Device::by_name("cuda").unwrap_err());
    println!("by ordinal: {}", Device::cuda(0).unwrap_err());
    println!("{} adapters", Device::enumerate().len());
    cache(&Device::cpu());
}
