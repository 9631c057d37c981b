//! The counter's tensors made on a GPU, so that nothing crosses its bus.

use super::counter::{Counter, Part};
use softhash::{Device, Result, Tensor, wgpu};
use std::ops::Range;

const SHADER: &str = "
    struct Place {
        base: u32, first: u32, heads: u32, channels: u32, period: u32, scale: f32, bf16: u32, words: u32,
    }
    @group(0) @binding(0) var<uniform> p: Place;
    @group(0) @binding(1) var<storage, read_write> out: array<u32>;

    fn mix(a: u32) -> u32 {
        var x = a;
        x = (x ^ (x >> 16u)) * 0x7feb352du;
        x = (x ^ (x >> 15u)) * 0x846ca68bu;
        return x ^ (x >> 16u);
    }

    fn element(index: u32) -> u32 {
        let row = index / p.channels;
        let token = (p.first + row / p.heads) % p.period;
        let key = mix(mix(p.base ^ token) ^ ((row % p.heads) * 0x9e3779b9u));
        let x = mix(key + (index % p.channels) * 0x9e3779b9u);
        let sum = (x & 255u) + ((x >> 8u) & 255u) + ((x >> 16u) & 255u) + (x >> 24u);
        return bitcast<u32>(f32(i32(sum) - 510) * p.scale);
    }

    // To nearest, ties to even; there are no infinities.
    fn to_bf16(bits: u32) -> u32 { return (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u; }

    @compute @workgroup_size(256)
    fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
        for (var at = id.x; at < p.words; at += groups.x * 256u) {
            if (p.bf16 == 1u) {
                out[at] = to_bf16(element(2u * at)) | (to_bf16(element(2u * at + 1u)) << 16u);
            } else {
                out[at] = element(at);
            }
        }
    }";

/// Makes tensors in buffers that it uses again: a tensor is good until the same part was made `SLOTS` times more.
pub struct Generator {
    device: Device,
    counter: Counter,
    pipeline: wgpu::ComputePipeline,
    slots: Vec<Slot>,
    made: [usize; 4],
}

struct Slot {
    part: Part,
    place: wgpu::Buffer,
    data: wgpu::Buffer,
    group: wgpu::BindGroup,
}

/// A stream holds one segment, has one waiting and one in the making.
const SLOTS: usize = 3;

impl Generator {
    /// `None` on the CPU path.
    pub fn new(device: &Device, counter: Counter) -> Option<Self> {
        let (gpu, _) = device.as_wgpu()?;
        let source = wgpu::ShaderSource::Wgsl(SHADER.into());
        let module = gpu.create_shader_module(wgpu::ShaderModuleDescriptor { label: None, source });
        let pipeline = gpu.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some("counter"),
            layout: None,
            module: &module,
            entry_point: None,
            compilation_options: wgpu::PipelineCompilationOptions::default(),
            cache: None,
        });
        Some(Self { device: device.clone(), counter, pipeline, slots: Vec::new(), made: [0; 4] })
    }

    /// Bytes of all buffers.
    pub fn bytes(&self) -> u64 {
        self.slots.iter().map(|slot| slot.data.size()).sum()
    }

    /// `[1, token, heads, channels]` on the device.
    pub fn tensor(&mut self, part: Part, tokens: Range<u64>) -> Result<Tensor> {
        let Counter { heads, channels, dtype, .. } = self.counter;
        let shape = [1, (tokens.end - tokens.start) as usize, heads, channels];
        let bytes = (shape.iter().product::<usize>() * dtype.size()) as u64;
        let words = (bytes / 4) as u32;
        let turn = self.made[part as usize] % SLOTS;
        self.made[part as usize] += 1;
        let slot = self.slot(part, turn, bytes);
        let Some((gpu, queue)) = self.device.as_wgpu() else { return self.counter.tensor(part, tokens) };
        let mut place = self.counter.shader_words(part, tokens.start).to_vec();
        place.push(words);
        let place: Vec<u8> = place.iter().flat_map(|word| word.to_le_bytes()).collect();
        let slot = &self.slots[slot];
        queue.write_buffer(&slot.place, 0, &place);
        let mut encoder = gpu.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        {
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            pass.set_pipeline(&self.pipeline);
            pass.set_bind_group(0, &slot.group, &[]);
            pass.dispatch_workgroups(words.div_ceil(256).min(65535), 1, 1);
        }
        queue.submit([encoder.finish()]);
        Tensor::from_buffer(&self.device, slot.data.clone(), dtype, shape)
    }

    /// Index of the part's `turn`-th slot, of at least `bytes`.
    fn slot(&mut self, part: Part, turn: usize, bytes: u64) -> usize {
        let of_part = self.slots.iter().enumerate().filter(|(_, slot)| slot.part == part);
        let found = of_part.map(|(i, _)| i).nth(turn);
        if let Some(index) = found
            && self.slots[index].data.size() >= bytes
        {
            return index;
        }
        let slot = self.make(part, bytes);
        match (slot, found) {
            (Some(slot), Some(index)) => {
                self.slots[index] = slot;
                index
            }
            (Some(slot), None) => {
                self.slots.push(slot);
                self.slots.len() - 1
            }
            (None, _) => 0,
        }
    }

    fn make(&self, part: Part, bytes: u64) -> Option<Slot> {
        let (gpu, _) = self.device.as_wgpu()?;
        let buffer = |size, usage| {
            gpu.create_buffer(&wgpu::BufferDescriptor {
                label: Some("counter"),
                size,
                usage,
                mapped_at_creation: false,
            })
        };
        let place = buffer(32, wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST);
        let data = buffer(bytes.next_multiple_of(4), wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC);
        let entries = [(0, &place), (1, &data)]
            .map(|(binding, buffer)| wgpu::BindGroupEntry { binding, resource: buffer.as_entire_binding() });
        let layout = self.pipeline.get_bind_group_layout(0);
        let group =
            gpu.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout: &layout, entries: &entries });
        Some(Slot { part, place, data, group })
    }
}
