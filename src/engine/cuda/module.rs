//! Kernels: compiled once from a typed key, kept in memory and on disk.

use super::cache::{DiskCache, Place};
use super::compile::{Arch, compile};
use super::context::{Context, outside_capture};
use super::driver::Version;
use crate::engine::lock;
use crate::error::{Error, Result};
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUfunction_attribute_enum as Attribute, CUresult};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::ffi::CString;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

/// Bytes of shared memory that a block may have unasked.
const UNASKED_SHARED: u32 = 48 << 10;

/// The only input of a kernel's text.
pub(crate) trait KernelKey: Send + Sync {
    /// The full identity: keys with equal labels have equal sources.
    fn label(&self) -> String;
    /// The kernel.
    fn source(&self) -> KernelSource;
    /// Compute capability times ten from which on it compiles.
    #[cfg(test)]
    fn least_capability(&self) -> i32 {
        0
    }
}

/// A kernel's text, and how it is compiled.
#[derive(Clone, Debug)]
pub(crate) struct KernelSource {
    /// Name of the text, for messages.
    pub file: &'static str,
    pub text: &'static str,
    /// What `#include "name"` finds: [`super::HEADERS`], or a room's own list.
    pub headers: &'static [(&'static str, &'static str)],
    /// `-D` of the compiler: the key's constants.
    pub defines: Vec<(&'static str, String)>,
    /// Further options of the compiler, such as `--use_fast_math`.
    pub options: &'static [&'static str],
    /// Name of the function, which is `extern "C"`.
    pub entry: &'static str,
}

impl KernelSource {
    pub(super) fn options(&self, arch: Arch) -> Vec<String> {
        let mut options = vec![format!("-arch={arch}"), "--std=c++17".to_string()];
        options.extend(self.options.iter().map(|option| (*option).to_string()));
        options.extend(self.defines.iter().map(|(name, value)| format!("-D{name}={value}")));
        options
    }

    /// A name for the code that comes of it, of everything that decides about it.
    fn fingerprint(&self, arch: Arch, nvrtc: Version, driver: Version) -> String {
        let mut hash = Sha256::new();
        let mut add = |part: &str| {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        };
        add("softhash kernel 1");
        add(&format!("{nvrtc} {driver}"));
        self.options(arch).iter().for_each(|option| add(option));
        add(self.file);
        add(self.text);
        for (name, text) in self.headers {
            add(name);
            add(text);
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// A compiled kernel, loaded.
#[derive(Debug)]
pub(crate) struct Kernel {
    function: sys::CUfunction,
    module: sys::CUmodule,
    /// Dynamic shared memory that the function may be launched with so far.
    shared_limit: AtomicU32,
    /// Largest value of the same.
    shared_most: u32,
    /// [`KernelKey::label`] of its key.
    pub label: String,
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of local memory of a thread.
    pub local: u32,
    /// Bytes of static shared memory.
    pub shared: u32,
    /// Threads of the largest block.
    pub max_threads: u32,
    /// Whether its code was found on disk.
    pub from_disk: bool,
}

// SAFETY: a function and a module are handles that the driver lets any thread use; they are only read here.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

impl Kernel {
    pub(super) fn function(&self) -> sys::CUfunction {
        self.function
    }

    /// Makes sure that a block may have `bytes` of dynamic shared memory.
    pub(super) fn allow_shared(&self, ctx: &Context, op: &'static str, bytes: u32) -> Result<()> {
        if bytes <= self.shared_limit.load(Ordering::Relaxed) {
            return Ok(());
        }
        if bytes > self.shared_most {
            let (value, limit) = (bytes.into(), self.shared_most.into());
            return Err(Error::Limit { op, what: "bytes of shared memory of a block", value, limit });
        }
        let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function belongs to a module that is loaded for as long as `self` lives.
        let set = || unsafe { result::function::set_function_attribute(self.function, attribute, bytes as i32) };
        ctx.check(op, outside_capture(set))?;
        self.shared_limit.fetch_max(bytes, Ordering::Relaxed);
        Ok(())
    }
}

type Cell = Arc<Mutex<Option<Arc<Kernel>>>>;

/// The kernels of a context.
#[derive(Debug)]
pub(super) struct Kernels {
    arch: Arch,
    versions: (Version, Version),
    disk: DiskCache,
    /// The map's lock is held for look-ups, a cell's while its kernel compiles.
    cells: Mutex<HashMap<String, Cell>>,
}

impl Kernels {
    /// `versions` of driver and compiler.
    pub fn new(arch: Arch, versions: (Version, Version), place: Place) -> Self {
        Self { arch, versions, disk: DiskCache::new(place), cells: Mutex::default() }
    }

    pub fn arch(&self) -> Arch {
        self.arch
    }

    pub fn folder(&self) -> Option<&Path> {
        self.disk.folder()
    }

    pub fn get(&self, ctx: &Context, op: &'static str, key: &dyn KernelKey) -> Result<Arc<Kernel>> {
        let label = key.label();
        let cell = lock(&self.cells).entry(label.clone()).or_default().clone();
        let mut compiled = lock(&cell);
        if let Some(kernel) = &*compiled {
            return Ok(kernel.clone());
        }
        let kernel = Arc::new(self.make(ctx, op, label, &key.source())?);
        *compiled = Some(kernel.clone());
        Ok(kernel)
    }

    pub fn warm_up(&self, ctx: &Context, keys: &[Box<dyn KernelKey>]) -> Result<()> {
        use rayon::prelude::*;
        keys.par_iter().try_for_each(|key| self.get(ctx, "warm_up", key.as_ref()).map(drop))
    }

    pub fn compiled(&self) -> Vec<Arc<Kernel>> {
        let cells: Vec<Cell> = lock(&self.cells).values().cloned().collect();
        // A cell that is locked is compiling still.
        let done = |cell: &Cell| cell.try_lock().ok().and_then(|compiled| compiled.clone());
        let mut kernels: Vec<_> = cells.iter().filter_map(done).collect();
        kernels.sort_unstable_by(|a, b| a.label.cmp(&b.label));
        kernels
    }

    fn make(&self, ctx: &Context, op: &'static str, label: String, source: &KernelSource) -> Result<Kernel> {
        let (driver, nvrtc) = self.versions;
        let fingerprint = source.fingerprint(self.arch, nvrtc, driver);
        if let Some(code) = self.disk.load(&fingerprint) {
            match self.load(ctx, op, &label, source.entry, &code, true) {
                // Whole, and yet not to the driver's liking: made anew, as if it had not been there.
                Err(Error::Gpu { message, .. }) => tracing::warn!(kernel = label, message, "cached code is refused"),
                other => return other,
            }
        }
        let compiled = compile(op, &label, source, self.arch, &[])?;
        if !compiled.log.is_empty() {
            tracing::debug!(kernel = label, log = compiled.log, "compiled with remarks");
        }
        let kernel = self.load(ctx, op, &label, source.entry, &compiled.image, false)?;
        self.disk.store(&fingerprint, &compiled.image);
        tracing::debug!(kernel = label, registers = kernel.registers, local = kernel.local, "compiled");
        Ok(kernel)
    }

    fn load(
        &self,
        ctx: &Context,
        op: &'static str,
        label: &str,
        entry: &'static str,
        code: &[u8],
        from_disk: bool,
    ) -> Result<Kernel> {
        // Intermediate code is text, which ends in a zero byte; machine code knows its length.
        let mut image = code.to_vec();
        image.push(0);
        let entry = CString::new(entry).unwrap_or_default();
        ctx.bind(op)?;
        // Loading allocates, which a capture under way forbids unless told otherwise.
        let loaded = outside_capture(|| -> Result<_, DriverError> {
            // SAFETY: the image is what the compiler made, whole by its checksum where it comes from disk.
            let module = unsafe { result::module::load_data(image.as_ptr().cast()) }?;
            // SAFETY: the module was loaded a line above; the name ends in a zero byte.
            match unsafe { result::module::get_function(module, entry) } {
                Ok(function) => Ok((module, function)),
                Err(error) => {
                    // SAFETY: nothing of the module is in use.
                    let _ = unsafe { result::module::unload(module) };
                    Err(error)
                }
            }
        });
        let (module, function) = ctx.check(op, loaded).map_err(|error| named(error, label))?;
        let attribute = |attribute| {
            // SAFETY: the function was loaded above.
            let value = unsafe { result::function::get_function_attribute(function, attribute) };
            value.unwrap_or(0).max(0) as u32
        };
        let shared = attribute(Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES);
        Ok(Kernel {
            function,
            module,
            shared_limit: AtomicU32::new(UNASKED_SHARED.saturating_sub(shared)),
            shared_most: ctx.caps().shared_memory.saturating_sub(shared),
            label: label.to_string(),
            registers: attribute(Attribute::CU_FUNC_ATTRIBUTE_NUM_REGS),
            local: attribute(Attribute::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES),
            shared,
            max_threads: attribute(Attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK),
            from_disk,
        })
    }

    /// Unloads everything; the context is bound and nothing runs any more.
    pub(super) fn unload(&self) {
        for (_, cell) in lock(&self.cells).drain() {
            if let Some(kernel) = lock(&cell).take() {
                // SAFETY: loaded once, and unloaded only here, at the end of its context's life.
                let _ = unsafe { result::module::unload(kernel.module) };
            }
        }
    }
}

fn named(error: Error, label: &str) -> Error {
    match error {
        Error::Gpu { op, message } => Error::Gpu { op, message: format!("kernel {label}: {message}") },
        other => other,
    }
}

/// Whether launching failed for want of registers, shared memory or threads.
pub(super) fn is_too_large(error: CUresult) -> bool {
    matches!(error, CUresult::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES | CUresult::CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE)
}
