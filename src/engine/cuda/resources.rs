//! What is tested of every kernel without a GPU: it compiles for every GPU without a warning, and takes no more of a
//! multiprocessor than it did.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::compile::{Arch, compile};
use super::{KernelKey, driver};
use std::collections::BTreeMap;
use std::fmt::Write;

/// The GPUs that the kernels are compiled for in tests.
const ARCHS: [Arch; 4] = [Arch::real(80), Arch::real(89), Arch::real(90), Arch::real(100)];

/// Every kernel with every GPU that it compiles for.
fn jobs(keys: &[Box<dyn KernelKey>]) -> impl Iterator<Item = (&dyn KernelKey, Arch)> {
    let all = keys.iter().flat_map(|key| ARCHS.map(|arch| (key.as_ref(), arch)));
    all.filter(|(key, arch)| arch.has(key.least_capability()))
}

/// What the assembler says of one kernel on one GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    registers: u32,
    /// Bytes of registers spilled to memory, stored and loaded.
    spilled: u32,
    /// Bytes of the stack: arrays that are not in registers, and what is spilled.
    stack: u32,
    /// Bytes of static shared memory.
    shared: u32,
}

/// The version that fills the table in, where one is to be had; with REQUIRE_NVRTC a missing one is a failure.
pub(crate) fn compiler() -> Option<String> {
    let version = driver::nvrtc();
    if version.is_none() {
        let required = std::env::var_os("REQUIRE_NVRTC").is_some_and(|value| value != "0");
        assert!(!required, "REQUIRE_NVRTC is set and libnvrtc is not to be found (LD_LIBRARY_PATH)");
        println!("left out: libnvrtc is not to be found");
    }
    version.map(|version| version.to_string())
}

/// Compiles a kernel and reads the assembler's report; warnings are errors.
pub(crate) fn measure(key: &dyn KernelKey, arch: Arch) -> Result<Usage, String> {
    let label = key.label();
    // Where there is a driver the compiler keeps what it made, and has nothing to report of it the next time.
    let options = ["--ptxas-options=-v", "--no-cache"];
    let compiled = compile("test", &label, &key.source(), arch, &options).map_err(|e| e.to_string())?;
    let (report, rest): (Vec<&str>, Vec<&str>) = compiled.log.lines().partition(|line| is_report(line));
    let rest: Vec<_> = rest.into_iter().filter(|line| !line.trim().is_empty()).collect();
    if !rest.is_empty() {
        return Err(format!("kernel {label} for {arch} compiles with warnings:\n{}", rest.join("\n")));
    }
    let words: Vec<&str> = report.iter().flat_map(|line| line.split([' ', ','])).filter(|w| !w.is_empty()).collect();
    let before = |what: &[&str]| -> u32 {
        let at = |i: usize| words[i..].starts_with(what).then(|| words[i - 1].parse::<u32>().ok()).flatten();
        (1..words.len()).filter_map(at).sum()
    };
    let usage = Usage {
        registers: before(&["registers"]),
        spilled: before(&["bytes", "spill", "stores"]) + before(&["bytes", "spill", "loads"]),
        stack: before(&["bytes", "stack", "frame"]),
        shared: before(&["bytes", "smem"]),
    };
    assert!(usage.registers > 0, "{label}: no report in {:?}", compiled.log);
    Ok(usage)
}

fn is_report(line: &str) -> bool {
    line.starts_with("ptxas info")
        || (line.contains("bytes stack frame") && (line.starts_with("ptxas  ") || line.starts_with("  ")))
}

/// The table as it is kept: one line for each kernel and GPU.
#[derive(Default)]
pub(crate) struct Table {
    compiler: String,
    lines: BTreeMap<(String, String), (Usage, String)>,
}

const HEAD: &str = "# What each CUDA kernel takes on each GPU. Made by SOFTHASH_BLESS=1 cargo test --features cuda cuda_kernels\n\
                    # A kernel that spills fails its test, unless its line ends with a reason in a column of its own.\n\
                    # kernel | GPU | registers | spilled bytes | stack bytes | shared bytes\n";

impl Table {
    /// Whether every kernel has its line for every GPU.
    pub fn has_all_of(&self, keys: &[Box<dyn KernelKey>]) -> bool {
        let at = |key: &dyn KernelKey, arch: Arch| self.lines.contains_key(&(key.label(), arch.name()));
        jobs(keys).all(|(key, arch)| at(key, arch))
    }

    pub fn parse(text: &str) -> Self {
        let mut table = Self::default();
        for line in text.lines().map(str::trim) {
            if let Some(version) = line.strip_prefix("compiler: NVRTC ") {
                table.compiler = version.into();
                continue;
            }
            let columns: Vec<_> = line.split('|').map(str::trim).collect();
            let ([label, arch, numbers @ ..], false) = (&columns[..], line.starts_with('#')) else { continue };
            let number = |i: usize| numbers.get(i).and_then(|n| n.parse().ok()).unwrap_or(u32::MAX);
            let usage = Usage { registers: number(0), spilled: number(1), stack: number(2), shared: number(3) };
            let reason = numbers.get(4).copied().unwrap_or_default().to_string();
            table.lines.insert(((*label).into(), (*arch).into()), (usage, reason));
        }
        table
    }

    pub fn text(&self) -> String {
        let mut out = format!("{HEAD}compiler: NVRTC {}\n", self.compiler);
        for ((label, arch), (usage, reason)) in &self.lines {
            let Usage { registers, spilled, stack, shared } = usage;
            let reason = if reason.is_empty() { String::new() } else { format!(" | {reason}") };
            writeln!(out, "{label} | {arch} | {registers} | {spilled} | {stack} | {shared}{reason}").unwrap();
        }
        out
    }
}

/// Compiles `keys` for every GPU and compares with `kept`: what is wrong, and the table as it is now. Numbers of another
/// version of the compiler are not compared, spills are.
pub(crate) fn examine(version: &str, keys: &[Box<dyn KernelKey>], kept: &Table) -> (Vec<String>, Table) {
    use rayon::prelude::*;
    let jobs: Vec<_> = jobs(keys).collect();
    let measured: Vec<_> = jobs.par_iter().map(|(key, arch)| measure(*key, *arch)).collect();
    let mut wrong = Vec::new();
    let mut now = Table { compiler: version.into(), lines: BTreeMap::new() };
    for ((key, arch), usage) in jobs.iter().zip(measured) {
        let at = (key.label(), arch.name());
        let usage = match usage {
            Ok(usage) => usage,
            Err(reason) => {
                wrong.push(reason);
                continue;
            }
        };
        let line = kept.lines.get(&at);
        let reason = line.map(|(_, reason)| reason.clone()).unwrap_or_default();
        if usage.spilled > 0 && reason.is_empty() {
            wrong.push(format!("{} for {}: spills {} bytes without a reason", at.0, at.1, usage.spilled));
        }
        match line {
            None => wrong.push(format!("{} for {}: not in the table", at.0, at.1)),
            Some((then, _)) if kept.compiler == version && *then != usage => {
                wrong.push(format!("{} for {}: {usage:?}, in the table {then:?}", at.0, at.1));
            }
            Some(_) => {}
        }
        now.lines.insert(at, (usage, reason));
    }
    for (label, arch) in kept.lines.keys().filter(|at| !now.lines.contains_key(*at)) {
        wrong.push(format!("{label} for {arch}: in the table and nowhere else"));
    }
    (wrong, now)
}

mod tests {
    use super::*;
    use crate::engine::cuda::KernelSource;

    struct Planted(&'static str, &'static [&'static str]);

    impl KernelKey for Planted {
        fn label(&self) -> String {
            "planted".into()
        }

        fn source(&self) -> KernelSource {
            let (text, options) = (self.0, self.1);
            KernelSource { file: "planted.cu", text, headers: &[], defines: Vec::new(), options, entry: "planted" }
        }
    }

    const GOOD: &str = "extern \"C\" __global__ void planted(float* x) { __shared__ float s[64]; s[threadIdx.x] = x[0]; \
                        __syncthreads(); x[1] = s[threadIdx.x ^ 1]; }";
    const WARNS: &str = "extern \"C\" __global__ void planted(float* x) { int unused; x[0] = 1.0f; }";
    const BROKEN: &str = "extern \"C\" __global__ void planted(float* x) {\n x[0] = nothing; }";
    const SPILLS: &str = "extern \"C\" __global__ void planted(float* x) { float a[64]; \
        for (int i = 0; i < 64; i++) a[i] = x[i]; \
        for (int r = 0; r < 64; r++) { float t = x[r * 64]; for (int i = 0; i < 64; i++) a[i] = a[i] * t + a[(i + 1) % 64]; } \
        for (int i = 0; i < 64; i++) x[i] = a[i]; }";

    /// Nothing that is planted goes through.
    #[test]
    fn planted_faults_are_found() {
        let Some(version) = compiler() else { return };
        let found = |text, options, kept: &Table| {
            let keys: Vec<Box<dyn KernelKey>> = vec![Box::new(Planted(text, options))];
            examine(&version, &keys, kept)
        };
        let (wrong, table) = found(GOOD, &[], &Table::default());
        assert_eq!(wrong.len(), 4, "{wrong:?}");
        assert!(wrong.iter().all(|line| line.contains("not in the table")), "{wrong:?}");
        let table = Table::parse(&table.text());
        assert_eq!(table.lines.len(), 4);
        assert!(table.lines.values().all(|(usage, _)| usage.shared >= 256 && usage.spilled == 0));
        assert_eq!(found(GOOD, &[], &table).0, Vec::<String>::new());
        let other = Table::parse(&table.text().replace(" | 0 | 0 | ", " | 0 | 8 | "));
        assert_eq!(found(GOOD, &[], &other).0.len(), 4, "numbers that differ");
        let limit = &["--maxrregcount=32"][..];
        let (_, spilling) = found(SPILLS, limit, &Table::default());
        for (text, options, part) in
            [(WARNS, &[][..], "never referenced"), (BROKEN, &[], "planted.cu(2): error"), (SPILLS, limit, "a reason")]
        {
            let (mut wrong, _) = found(text, options, &spilling);
            wrong.retain(|line| line.contains(part));
            assert_eq!(wrong.len(), 4, "{part}: {wrong:?}");
        }
        let excused: String = spilling.text().lines().map(|line| format!("{line} | planted\n")).collect();
        let excused = Table::parse(&excused.replace(&format!("{version} | planted"), &version));
        assert_eq!(found(SPILLS, limit, &excused).0, Vec::<String>::new());
        assert_eq!(examine(&version, &[], &table).0.len(), 4, "lines of no kernel");
        let planted: [Box<dyn KernelKey>; 1] = [Box::new(Planted(BROKEN, &[]))];
        assert!(table.has_all_of(&planted), "a label is a label");
        assert!(!found(BROKEN, &[], &table).1.has_all_of(&planted), "what does not compile has no line");
    }
}
