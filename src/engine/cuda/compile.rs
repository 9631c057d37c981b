//! Kernels' text to code of a GPU, by NVRTC. No device is needed.

use super::include::assemble;
use super::module::KernelSource;
use crate::error::{Error, Result};
use cudarc::nvrtc::sys;
use std::ffi::{CString, c_char, c_int};

/// What code is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Arch {
    /// Compute capability times ten: 80, 89, 90, 100.
    number: i32,
    fit: Fit,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fit {
    /// Machine code of the very GPU.
    Exact,
    /// Machine code that runs on later minor versions too.
    Family,
    /// Intermediate code, which the driver finishes.
    Virtual,
}

impl Arch {
    /// Machine code of exactly this capability.
    #[cfg_attr(not(test), allow(dead_code, reason = "no kernel here wants it yet"))]
    pub const fn real(number: i32) -> Self {
        Self { number, fit: Fit::Exact }
    }

    /// The nearest that a compiler knowing `supported` makes for a GPU of `capability`.
    pub fn choose(capability: (i32, i32), supported: &[i32]) -> Option<Self> {
        let wanted = capability.0 * 10 + capability.1;
        let number = supported.iter().copied().filter(|&number| number <= wanted).max()?;
        let fit = match number {
            _ if number == wanted => Fit::Exact,
            _ if number / 10 == capability.0 => Fit::Family,
            _ => Fit::Virtual,
        };
        Some(Self { number, fit })
    }

    /// Whether code made for this may use what GPUs of `number`, a compute capability times ten, have.
    pub fn has(self, number: i32) -> bool {
        self.number >= number
    }

    /// The option's value: from 9.0 on the variant with all of that GPU's instructions, which runs nowhere else.
    pub fn name(self) -> String {
        let number = self.number;
        match self.fit {
            Fit::Exact if number >= 90 => format!("sm_{number}a"),
            Fit::Exact | Fit::Family => format!("sm_{number}"),
            Fit::Virtual => format!("compute_{number}"),
        }
    }
}

impl std::fmt::Display for Arch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name())
    }
}

/// Compiled code, and what the compiler said about it.
pub(crate) struct Compiled {
    pub image: Vec<u8>,
    pub log: String,
}

/// Capabilities that the compiler makes code for.
pub(super) fn supported() -> Vec<i32> {
    let mut count: c_int = 0;
    // SAFETY: the compiler writes the one integer that it is given. Its library is there, see `driver::nvrtc`.
    if unsafe { sys::nvrtcGetNumSupportedArchs(&raw mut count) }.result().is_err() {
        return Vec::new();
    }
    let mut archs = vec![0; count.max(0) as usize];
    // SAFETY: the compiler writes as many integers as it said.
    match unsafe { sys::nvrtcGetSupportedArchs(archs.as_mut_ptr()) }.result() {
        Ok(()) => archs,
        Err(_) => Vec::new(),
    }
}

/// A program under compilation.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        if self.0.is_null() {
            return;
        }
        // SAFETY: it was created and is not used any more.
        let _ = unsafe { sys::nvrtcDestroyProgram(&raw mut self.0) };
    }
}

/// A size, then as many bytes: how the compiler hands things out.
type Size = unsafe fn(sys::nvrtcProgram, *mut usize) -> sys::nvrtcResult;
type Bytes = unsafe fn(sys::nvrtcProgram, *mut c_char) -> sys::nvrtcResult;

impl Program {
    fn fetch(&self, size: Size, bytes: Bytes) -> Result<Vec<u8>, String> {
        let mut length = 0;
        // SAFETY: the program lives, and the compiler writes the one size that it is given.
        unsafe { size(self.0, &raw mut length) }.result().map_err(|error| format!("{:?}", error.0))?;
        let mut out = vec![0u8; length];
        // SAFETY: as before, and there is room for as many bytes as it said.
        unsafe { bytes(self.0, out.as_mut_ptr().cast()) }.result().map_err(|error| format!("{:?}", error.0))?;
        Ok(out)
    }

    fn log(&self) -> String {
        let log = self.fetch(sys::nvrtcGetProgramLogSize, sys::nvrtcGetProgramLog).unwrap_or_default();
        String::from_utf8_lossy(&log).trim_matches(['\0', '\n', ' ']).to_string()
    }
}

/// Compiles `source` for `arch`; `extra` options come last. NVRTC must be there, see [`super::driver::nvrtc`].
///
/// # Errors
/// [`Error::Gpu`] with the compiler's words.
pub(crate) fn compile(
    op: &'static str,
    label: &str,
    source: &KernelSource,
    arch: Arch,
    extra: &[&str],
) -> Result<Compiled> {
    try_compile(source, arch, extra)
        .map_err(|reason| Error::Gpu { op, message: format!("kernel {label} for {arch}: {reason}") })
}

fn try_compile(source: &KernelSource, arch: Arch, extra: &[&str]) -> Result<Compiled, String> {
    let c_string = |text: &str| CString::new(text).map_err(|_| format!("a zero byte in {text:?}"));
    let text = c_string(&assemble(source.file, source.text, source.headers)?)?;
    let name = c_string(source.file)?;
    let mut options = source.options(arch);
    options.extend(extra.iter().map(|option| (*option).to_string()));
    let options = options.iter().map(|option| c_string(option)).collect::<Result<Vec<_>, _>>()?;
    let options: Vec<_> = options.iter().map(|option| option.as_c_str()).collect();
    let option_texts: Vec<_> = options.iter().map(|option| option.as_ptr()).collect();
    let mut program = Program(std::ptr::null_mut());
    let none = std::ptr::null();
    // SAFETY: both strings end in a zero byte and outlive the program, and there are no headers.
    let created = unsafe { sys::nvrtcCreateProgram(&raw mut program.0, text.as_ptr(), name.as_ptr(), 0, none, none) };
    created.result().map_err(|error| format!("{:?}", error.0))?;
    // SAFETY: the program was created, and the options outlive the call.
    let done = unsafe { sys::nvrtcCompileProgram(program.0, option_texts.len() as c_int, option_texts.as_ptr()) };
    let log = program.log();
    done.result().map_err(|error| if log.is_empty() { format!("{:?}", error.0) } else { log.clone() })?;
    let image = if arch.fit == Fit::Virtual {
        program.fetch(sys::nvrtcGetPTXSize, sys::nvrtcGetPTX)?
    } else {
        program.fetch(sys::nvrtcGetCUBINSize, sys::nvrtcGetCUBIN)?
    };
    if image.is_empty() {
        return Err("the compiler made nothing".into());
    }
    Ok(Compiled { image, log })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;

    fn source(text: &'static str) -> KernelSource {
        let headers = &[("twice.cuh", "#pragma once\n__device__ int twice(int x) { return 2 * x; }\n")];
        KernelSource { file: "bad.cu", text, headers, defines: vec![("N", "7".into())], options: &[], entry: "bad" }
    }

    /// No GPU is needed for it; a missing compiler fails only where the tests are told that it is there.
    #[test]
    fn what_does_not_compile_says_which_kernel_and_where() {
        if super::super::driver::nvrtc().is_none() {
            assert!(std::env::var_os("REQUIRE_NVRTC").is_none(), "NVRTC is missing");
            return println!("left out: no NVRTC");
        }
        for (text, part) in [
            ("extern \"C\" __global__ void bad(int* to) {\n  to[0] = nothing; }", "bad.cu(2): error"),
            ("\n#include \"twice.cuh\"\nvoid bad() { twice(); }", "bad.cu(3): error"),
            ("#include \"gone.cuh\"\n", "bad.cu, line 1: no header \"gone.cuh\""),
            ("extern \"C\" __global__ void bad(int* to) { asm(\"no.such.instruction;\"); }", "ptxas"),
            ("void bad() { \0 }", "a zero byte"),
        ] {
            let Err(error) = compile("test", "kernel's label", &source(text), Arch::real(90), &[]) else {
                panic!("{text:?} compiles")
            };
            assert!(matches!(error, Error::Gpu { op: "test", .. }), "{error:?}");
            let error = error.to_string();
            assert!(error.contains("kernel kernel's label for sm_90a: ") && error.contains(part), "{error}");
        }
        let good = source("#include \"twice.cuh\"\nextern \"C\" __global__ void bad(int* to) { *to = twice(N); }");
        assert!(!compile("test", "good", &good, Arch::real(90), &[]).unwrap().image.is_empty());
        let error = compile("test", "good", &good, Arch::real(90), &["--no-such-option"]).map(drop).unwrap_err();
        assert!(error.to_string().contains("no-such-option"), "{error}");
        // Of a GPU that the compiler does not know.
        let error = compile("test", "good", &good, Arch::real(12), &[]).map(drop).unwrap_err();
        assert!(error.to_string().contains("sm_12"), "{error}");
    }

    #[test]
    fn the_nearest_code_is_chosen() {
        let name = |capability, supported: &[i32]| Arch::choose(capability, supported).map(Arch::name);
        let supported = [75, 80, 86, 89, 90, 100, 120];
        for (capability, expected) in
            [((8, 0), "sm_80"), ((8, 7), "sm_86"), ((9, 0), "sm_90a"), ((10, 3), "sm_100"), ((11, 0), "compute_100")]
        {
            assert_eq!(name(capability, &supported).as_deref(), Some(expected));
        }
        assert_eq!(name((8, 0), &[90]), None);
    }
}
