//! Sources of segments: host memory, and files in it.

use crate::error::{Error, Result};
use crate::race::stream::{Segment, SegmentSource, StreamFailure, Wanted};
use crate::tensor::TensorView;
use std::ops::Range;

/// Segments of tensors in host memory, copied out one at a time.
#[derive(Clone, Copy, Debug)]
pub struct HostSource<'a> {
    q: TensorView<'a>,
    k: TensorView<'a>,
    v: TensorView<'a>,
    grad_o: Option<TensorView<'a>>,
}

impl<'a> HostSource<'a> {
    /// The tensors of [`crate::Race::forward`]; for backward streams `grad_o` too.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] where batch or tokens differ between them, [`crate::Error::OutOfBounds`] where one
    /// reaches outside its storage, [`crate::Error::NonFinite`].
    pub fn new(
        q: TensorView<'a>,
        k: TensorView<'a>,
        v: TensorView<'a>,
        grad_o: Option<TensorView<'a>>,
    ) -> Result<Self> {
        let [batch, tokens, ..] = q.shape();
        for (name, view) in [("q", Some(&q)), ("k", Some(&k)), ("v", Some(&v)), ("grad_o", grad_o.as_ref())] {
            if let Some(view) = view {
                view.check("source", name, [Some(batch), Some(tokens), None, None])?;
            }
        }
        Ok(Self { q, k, v, grad_o })
    }
}

impl SegmentSource for HostSource<'_> {
    fn batch(&self) -> usize {
        self.q.shape()[0]
    }

    fn tokens(&self) -> u64 {
        self.q.shape()[1] as u64
    }

    fn read(&mut self, tokens: Range<u64>, wanted: Wanted) -> Result<Segment, StreamFailure> {
        let tokens = tokens.start as usize..tokens.end as usize;
        let copy = |name, view: Option<&TensorView<'_>>, wanted: bool| {
            let view = view.filter(|_| wanted);
            view.map(|view| view.copy_tokens("source", name, tokens.clone())).transpose()
        };
        Ok(Segment {
            q: copy("q", Some(&self.q), wanted.q)?,
            k: copy("k", Some(&self.k), wanted.k)?,
            v: copy("v", Some(&self.v), wanted.v)?,
            grad_o: copy("grad_o", self.grad_o.as_ref(), wanted.grad_o)?,
        })
    }
}

/// Segments that stay where they are, on a device or on the host: sequences larger than one buffer, as a list of them.
#[derive(Clone, Debug)]
pub struct ResidentSource {
    segments: Vec<Segment>,
    segment_tokens: u64,
    batch: usize,
    tokens: u64,
}

impl ResidentSource {
    /// Segments in order: each of as many tokens as the first, the last of at most that. Streams over them must take
    /// segments of that length ([`crate::StreamOptions::segment_tokens`]), or of all tokens where there is but one.
    ///
    /// # Errors
    /// [`Error::Shape`] where there is none, where one lacks q, k or v, or where batch or tokens differ.
    pub fn new(segments: Vec<Segment>) -> Result<Self> {
        let op = "source";
        let shape_of = |segment: &Segment| segment.q.as_ref().map(|q| q.shape().to_vec()).unwrap_or_default();
        let first = segments.first().map(shape_of).unwrap_or_default();
        let [batch, segment_tokens, ..] = *first else {
            let expected = "at least one segment, with q, k and v".into();
            return Err(Error::Shape { op, tensor: "segments", got: vec![segments.len()], expected });
        };
        let mut tokens = 0;
        for (i, segment) in segments.iter().enumerate() {
            let own = shape_of(segment).get(1).copied().unwrap_or_default();
            let last = i + 1 == segments.len();
            let parts = [("q", &segment.q), ("k", &segment.k), ("v", &segment.v), ("grad_o", &segment.grad_o)];
            for (tensor, part) in parts {
                let shape = part.as_ref().map(|part| part.shape().to_vec());
                let fits = shape.as_ref().map_or(tensor == "grad_o", |shape| {
                    shape[..2] == [batch, own] && (own == segment_tokens || last && own < segment_tokens)
                });
                if !fits {
                    let expected = format!("[{batch}, {segment_tokens}, ..] in segment {i}");
                    return Err(Error::Shape { op, tensor, got: shape.unwrap_or_default(), expected });
                }
            }
            tokens += own as u64;
        }
        Ok(Self { segments, segment_tokens: segment_tokens as u64, batch, tokens })
    }

    /// Tokens of every segment but the last.
    pub fn segment_tokens(&self) -> usize {
        self.segment_tokens as usize
    }
}

impl SegmentSource for ResidentSource {
    fn batch(&self) -> usize {
        self.batch
    }

    fn tokens(&self) -> u64 {
        self.tokens
    }

    fn read(&mut self, tokens: Range<u64>, _: Wanted) -> Result<Segment, StreamFailure> {
        let index = tokens.start.checked_div(self.segment_tokens).unwrap_or_default();
        let start = index * self.segment_tokens;
        let whole = start..start.saturating_add(self.segment_tokens).min(self.tokens);
        match self.segments.get(index as usize) {
            Some(segment) if tokens == whole => Ok(segment.clone()),
            _ => Err(format!("tokens {tokens:?} are no segment: they have {} each", self.segment_tokens).into()),
        }
    }
}

#[cfg(feature = "mmap")]
pub use file::SafetensorsSource;

#[cfg(feature = "mmap")]
mod file {
    use super::*;
    use crate::file::bad_file;
    use crate::tensor::Tensor;
    use half::{bf16, f16};
    use safetensors::SafeTensors;
    use safetensors::tensor::{Dtype, TensorInfo};
    use std::path::Path;

    /// Segments of a memory-mapped safetensors file with tensors `q`, `k`, `v` and, for backward streams, `grad_o`, each
    /// `[batch, token, head, channel]` in F32, F16 or BF16. Only the pages at hand are in memory.
    ///
    /// The file must not change while it is mapped; should it be cut short, the system ends the process.
    #[derive(Debug)]
    pub struct SafetensorsSource {
        map: memmap2::Mmap,
        data: usize,
        tensors: [Option<TensorInfo>; 4],
        batch: usize,
        tokens: usize,
    }

    const NAMES: [&str; 4] = ["q", "k", "v", "grad_o"];

    impl SafetensorsSource {
        /// Maps a file.
        ///
        /// # Errors
        /// [`crate::Error::File`] where it cannot be read, is no safetensors file, lacks q, k or v, or where their
        /// shapes or dtypes do not fit.
        pub fn open(path: impl AsRef<Path>) -> Result<Self> {
            let path = path.as_ref();
            let named = |e: &dyn std::fmt::Display| bad_file(format!("{}: {e}", path.display()));
            let file = std::fs::File::open(path).map_err(|e| named(&e))?;
            // SAFETY: read only; that nobody changes the file meanwhile is the caller's part, as documented.
            let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| named(&e))?;
            // This bounds every tensor by the size of the file.
            let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|e| named(&e))?;
            let tensors = NAMES.map(|name| metadata.info(name).cloned());
            let shape = |i: usize| tensors[i].as_ref().map(|info| info.shape.as_slice()).unwrap_or_default();
            let [batch, tokens, ..] = *shape(0) else {
                return Err(named(&"tensor q must be [batch, token, head, channel]"));
            };
            for (name, info) in NAMES.iter().zip(&tensors) {
                match info {
                    Some(info) if info.shape.len() != 4 || info.shape[..2] != [batch, tokens] => {
                        let reason =
                            format!("tensor {name} has shape {:?}, expected [{batch}, {tokens}, _, _]", info.shape);
                        return Err(named(&reason));
                    }
                    Some(info) if !matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) => {
                        return Err(named(&format!("tensor {name} is {:?}, expected F32, F16 or BF16", info.dtype)));
                    }
                    None if *name != "grad_o" => return Err(named(&format!("tensor {name} is missing"))),
                    _ => {}
                }
            }
            Ok(Self { map, data: 8 + header, tensors, batch, tokens })
        }

        fn copy(&self, index: usize, tokens: Range<usize>) -> Result<Option<Tensor>, StreamFailure> {
            let Some(info) = &self.tensors[index] else { return Ok(None) };
            let [heads, channels] = [info.shape[2], info.shape[3]];
            let size = if info.dtype == Dtype::F32 { 4 } else { 2 };
            let row = heads * channels * size;
            let start = self.data + info.data_offsets.0;
            let mut bytes = Vec::with_capacity(self.batch * tokens.len() * row);
            for b in 0..self.batch {
                let first = start + (b * self.tokens + tokens.start) * row;
                let range = first..first + tokens.len() * row;
                bytes.extend_from_slice(self.map.get(range).ok_or("the range ends outside the file")?);
            }
            let shape = [self.batch, tokens.len(), heads, channels];
            Ok(Some(match info.dtype {
                Dtype::F32 => Tensor::from_f32(bytemuck::pod_collect_to_vec(&bytes), shape)?,
                Dtype::F16 => Tensor::from_f16(bytemuck::pod_collect_to_vec::<u8, f16>(&bytes), shape)?,
                _ => Tensor::from_bf16(bytemuck::pod_collect_to_vec::<u8, bf16>(&bytes), shape)?,
            }))
        }
    }

    impl SegmentSource for SafetensorsSource {
        fn batch(&self) -> usize {
            self.batch
        }

        fn tokens(&self) -> u64 {
            self.tokens as u64
        }

        fn read(&mut self, tokens: Range<u64>, wanted: Wanted) -> Result<Segment, StreamFailure> {
            if tokens.end > self.tokens as u64 {
                return Err(format!("tokens {tokens:?} of {}", self.tokens).into());
            }
            let tokens = tokens.start as usize..tokens.end as usize;
            let copy = |index, wanted: bool| if wanted { self.copy(index, tokens.clone()) } else { Ok(None) };
            Ok(Segment {
                q: copy(0, wanted.q)?,
                k: copy(1, wanted.k)?,
                v: copy(2, wanted.v)?,
                grad_o: copy(3, wanted.grad_o)?,
            })
        }
    }
}
