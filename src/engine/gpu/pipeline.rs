//! Compute pipelines: compiled once from a typed key and kept.

use super::caps::Caps;
use super::context::{Context, scoped};
use crate::engine::lock;
use crate::engine::seal::{sealed, unsealed};
use crate::error::{Error, Result};
use std::collections::HashMap;
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex};

/// The only input of a shader's text.
pub(crate) trait KernelKey: Send + Sync {
    /// The full identity: keys with equal labels have equal sources.
    fn label(&self) -> String;
    /// The shader.
    fn source(&self) -> KernelSource;
}

/// A shader and what it binds.
pub(crate) struct KernelSource {
    pub wgsl: String,
    /// Bindings of group 0, in order.
    pub bindings: Vec<Binding>,
    pub entry: &'static str,
}

/// What stands at one binding of group 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Binding {
    /// Uniform in a [`super::Slot`], at a dynamic offset; bound with `size` bytes.
    Uniform { size: u64 },
    /// Read-only storage.
    Read,
    /// Storage.
    ReadWrite,
}

/// A compiled kernel.
#[derive(Debug)]
pub(crate) struct Pipeline {
    pub pipeline: wgpu::ComputePipeline,
    pub layout: wgpu::BindGroupLayout,
    /// [`KernelKey::label`] of its key.
    pub label: String,
    pub uses_f16: bool,
    pub uses_subgroups: bool,
}

type Cell = Arc<Mutex<Option<Arc<Pipeline>>>>;

#[derive(Debug)]
pub(super) struct Pipelines {
    /// The map's lock is held for look-ups, a cell's while its pipeline compiles.
    cells: Mutex<HashMap<String, Cell>>,
    cache: Option<wgpu::PipelineCache>,
}

impl Pipelines {
    pub fn new(device: &wgpu::Device, caps: &Caps, data: Option<&[u8]>) -> Result<Self> {
        let cache = if caps.pipeline_cache {
            let data = data.and_then(unsealed);
            let descriptor = wgpu::PipelineCacheDescriptor { label: Some("softhash"), data, fallback: true };
            // SAFETY: the data, if any, carries the checksum that `sealed` put on data of wgpu's own `get_data`, and
            // wgpu drops data of another adapter or driver.
            Some(scoped(device, "pipeline cache", None, || unsafe { device.create_pipeline_cache(&descriptor) })?)
        } else {
            None
        };
        Ok(Self { cells: Mutex::default(), cache })
    }

    pub fn get(&self, ctx: &Context, op: &'static str, key: &dyn KernelKey) -> Result<Arc<Pipeline>> {
        let label = key.label();
        let cell = lock(&self.cells).entry(label.clone()).or_default().clone();
        let mut compiled = lock(&cell);
        if let Some(pipeline) = &*compiled {
            return Ok(pipeline.clone());
        }
        let pipeline = Arc::new(self.compile(ctx, op, label, &key.source())?);
        *compiled = Some(pipeline.clone());
        Ok(pipeline)
    }

    #[cfg(not(target_arch = "wasm32"))]
    pub fn warm_up(&self, ctx: &Context, keys: &[Box<dyn KernelKey>]) -> Result<()> {
        use rayon::prelude::*;
        keys.par_iter().try_for_each(|key| self.get(ctx, "warm_up", key.as_ref()).map(drop))
    }

    #[cfg(target_arch = "wasm32")]
    pub fn warm_up(&self, ctx: &Context, keys: &[Box<dyn KernelKey>]) -> Result<()> {
        keys.iter().try_for_each(|key| self.get(ctx, "warm_up", key.as_ref()).map(drop))
    }

    pub fn compiled(&self) -> Vec<Arc<Pipeline>> {
        let cells: Vec<Cell> = lock(&self.cells).values().cloned().collect();
        // A cell that is locked is compiling still.
        let done = |cell: &Cell| cell.try_lock().ok().and_then(|compiled| compiled.clone());
        let mut pipelines: Vec<_> = cells.iter().filter_map(done).collect();
        pipelines.sort_unstable_by(|a, b| a.label.cmp(&b.label));
        pipelines
    }

    pub fn cache_data(&self) -> Option<Vec<u8>> {
        self.cache.as_ref()?.get_data().map(|data| sealed(&data))
    }

    fn compile(&self, ctx: &Context, op: &'static str, label: String, source: &KernelSource) -> Result<Pipeline> {
        ctx.check_alive(op)?;
        let device = ctx.device();
        let entries: Vec<_> = (0..).zip(&source.bindings).map(|(i, binding)| layout_entry(i, *binding)).collect();
        let name = Some(label.as_str());
        let made = ctx.scoped(op, || {
            let module = wgpu::ShaderModuleDescriptor {
                label: name,
                source: wgpu::ShaderSource::Wgsl(source.wgsl.as_str().into()),
            };
            let module = if ctx.caps().unchecked {
                // SAFETY: every index of these shaders is bounded by the plan that sizes buffers and dispatches,
                // their loops end and their divisors are not zero; the checked twin runs in the tests.
                unsafe { device.create_shader_module_trusted(module, wgpu::ShaderRuntimeChecks::unchecked()) }
            } else {
                device.create_shader_module(module)
            };
            let layout =
                device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: name, entries: &entries });
            let groups =
                wgpu::PipelineLayoutDescriptor { label: name, bind_group_layouts: &[Some(&layout)], immediate_size: 0 };
            let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: name,
                layout: Some(&device.create_pipeline_layout(&groups)),
                module: &module,
                entry_point: Some(source.entry),
                compilation_options: wgpu::PipelineCompilationOptions {
                    constants: &[],
                    // The kernels write workgroup memory before they read it.
                    zero_initialize_workgroup_memory: false,
                },
                cache: self.cache.as_ref(),
            });
            (pipeline, layout)
        });
        match made {
            Ok((pipeline, layout)) => {
                ctx.check_alive(op)?;
                tracing::debug!(kernel = label, "compiled");
                Ok(Pipeline {
                    pipeline,
                    layout,
                    label,
                    uses_f16: source.wgsl.lines().any(|line| line.trim() == "enable f16;"),
                    uses_subgroups: uses_subgroups(&source.wgsl),
                })
            }
            Err(Error::Gpu { op, message }) => Err(Error::Gpu { op, message: format!("kernel {label}: {message}") }),
            Err(other) => Err(other),
        }
    }
}

/// Compiles all of `keys`, each on a task of rayon's pool.
#[cfg(not(target_arch = "wasm32"))]
pub(super) async fn compile_all(ctx: Arc<Context>, keys: Vec<Box<dyn KernelKey>>) -> Result<()> {
    use futures::channel::oneshot;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    let mut answers = Vec::with_capacity(keys.len());
    for key in keys {
        let (send, receive) = oneshot::channel();
        let ctx = ctx.clone();
        answers.push(receive);
        rayon::spawn(move || {
            // A panic that left the task would end the process; so it drops the sender, which is told below. Nobody
            // may be waiting any more, hence the ignored result.
            let _ = catch_unwind(AssertUnwindSafe(|| {
                let _ = send.send(ctx.pipeline("warm_up", key.as_ref()).map(drop));
            }));
        });
    }
    let mut all = Ok(());
    for answer in answers {
        let abandoned = |_| Err(Error::Gpu { op: "warm_up", message: "a compilation was given up".into() });
        all = all.and(answer.await.unwrap_or_else(abandoned));
    }
    all
}

/// One thread is all there is: it is given back after each kernel.
#[cfg(target_arch = "wasm32")]
pub(super) use compile_in_turn as compile_all;

#[cfg(any(test, target_arch = "wasm32"))]
pub(super) async fn compile_in_turn(ctx: Arc<Context>, keys: Vec<Box<dyn KernelKey>>) -> Result<()> {
    for key in keys {
        ctx.pipeline("warm_up", key.as_ref())?;
        let mut returned = false;
        std::future::poll_fn(|task| {
            if std::mem::replace(&mut returned, true) {
                return std::task::Poll::Ready(());
            }
            task.waker().wake_by_ref();
            std::task::Poll::Pending
        })
        .await;
    }
    Ok(())
}

/// Whether the text calls a subgroup function or takes a subgroup's built-in value.
fn uses_subgroups(wgsl: &str) -> bool {
    wgsl.contains("@builtin(subgroup")
        || wgsl
            .match_indices("subgroup")
            .any(|(i, word)| wgsl[i + word.len()..].starts_with(|next: char| next.is_ascii_uppercase()))
}

fn layout_entry(binding: u32, what: Binding) -> wgpu::BindGroupLayoutEntry {
    let storage = |read_only| wgpu::BufferBindingType::Storage { read_only };
    let (ty, size) = match what {
        Binding::Uniform { size } => (wgpu::BufferBindingType::Uniform, Some(size)),
        Binding::Read => (storage(true), None),
        Binding::ReadWrite => (storage(false), None),
    };
    wgpu::BindGroupLayoutEntry {
        binding,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer {
            ty,
            has_dynamic_offset: size.is_some(),
            min_binding_size: size.and_then(NonZeroU64::new),
        },
        count: None,
    }
}
