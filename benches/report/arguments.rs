//! What is asked for.

use super::figure::Table;
use clap::Parser;
use std::path::PathBuf;

/// Measures SOCKET, RACE and dense attention on every device of this machine, and writes tables (Markdown, JSON) and
/// plots (SVG) into a folder. Every result is checked before it is timed.
#[derive(Clone, Debug, Parser)]
#[command(name = "report")]
pub struct Arguments {
    /// `cuda`, `cpu`, or part of a GPU adapter's name; again for more. By default CUDA, the best GPU through wgpu, and
    /// the CPU.
    #[arg(long)]
    pub device: Vec<String>,
    /// Where tables and plots go.
    #[arg(long, default_value = "report")]
    pub out: PathBuf,
    /// Tables to make; all by default.
    #[arg(long, value_delimiter = ',')]
    pub only: Vec<Table>,
    /// Small sizes and few repeats: whether all of it works, not how fast it is.
    #[arg(long)]
    pub quick: bool,
    /// Seconds that the whole run takes at most, but for the figure under way; the devices share it, and what is left out
    /// is said.
    #[arg(long)]
    pub time_limit: Option<f64>,
    /// Seconds of measuring per figure.
    #[arg(long)]
    pub seconds: Option<f64>,
    /// Keys of decoding.
    #[arg(long, value_delimiter = ',')]
    pub lengths: Vec<usize>,
    /// Query and key/value heads of decoding, as 32/8; the first also of batches, head dimensions and appending.
    #[arg(long, value_delimiter = ',', value_parser = heads)]
    pub heads: Vec<(usize, usize)>,
    /// Tokens of RACE.
    #[arg(long, value_delimiter = ',')]
    pub tokens: Vec<u64>,
    /// P and L of RACE, as 2x2.
    #[arg(long, value_delimiter = ',', value_parser = hash)]
    pub hashes: Vec<(usize, usize)>,
    /// Element types of RACE.
    #[arg(long, value_delimiter = ',')]
    pub dtypes: Vec<String>,
    /// Measures what else there is: without a value by Python, PyTorch and `benches/vendor_dense.py`, which is in this
    /// program; or a file that it, or `peers.py`, has written in the same hour on the same machine. Again for more.
    #[arg(long, num_args = 0..=1, default_missing_value = "measure", value_name = "FILE")]
    pub vendor: Vec<String>,
    /// Commit to name; by default the one that SOFTHASH_COMMIT named when this was built, else git's.
    #[arg(long)]
    pub commit: Option<String>,
    /// Given by cargo.
    #[arg(long, hide = true)]
    pub bench: bool,
}

fn pair(text: &str, between: char) -> Result<(usize, usize), String> {
    let wrong = || format!("{text:?} is not two numbers with {between:?} between them");
    let (a, b) = text.split_once(between).ok_or_else(wrong)?;
    Ok((a.parse().map_err(|_| wrong())?, b.parse().map_err(|_| wrong())?))
}

fn heads(text: &str) -> Result<(usize, usize), String> {
    let (q, kv) = pair(text, '/')?;
    if kv == 0 || !q.is_multiple_of(kv) {
        return Err(format!("{q} query heads are no multiple of {kv} key/value heads"));
    }
    Ok((q, kv))
}

fn hash(text: &str) -> Result<(usize, usize), String> {
    pair(text, 'x')
}

/// The sizes that are measured.
#[derive(Clone, Debug)]
pub struct Sizes {
    pub lengths: Vec<usize>,
    pub heads: Vec<(usize, usize)>,
    pub head_dim: usize,
    /// Keys of each sequence of a batch.
    pub ragged: Vec<usize>,
    pub head_dims: Vec<usize>,
    /// Keys of that table.
    pub head_dims_keys: usize,
    /// Tokens appended.
    pub append: usize,
    pub tokens: Vec<u64>,
    pub hashes: Vec<(usize, usize)>,
    pub dtypes: Vec<String>,
    pub race_heads: usize,
    /// Heads and sequences of RACE's steps.
    pub steps: Vec<(usize, usize)>,
    pub step_hashes: Vec<(usize, usize)>,
    pub seconds: f64,
}

const K: usize = 1 << 10;

impl Sizes {
    pub fn new(arguments: &Arguments) -> Self {
        let mut sizes = if arguments.quick { Self::quick() } else { Self::full() };
        let Arguments { lengths, heads, tokens, hashes, dtypes, seconds, .. } = arguments.clone();
        take(&mut sizes.lengths, lengths);
        take(&mut sizes.heads, heads);
        take(&mut sizes.tokens, tokens);
        take(&mut sizes.hashes, hashes);
        take(&mut sizes.dtypes, dtypes);
        sizes.lengths.sort_unstable();
        sizes.seconds = seconds.unwrap_or(sizes.seconds);
        sizes
    }

    /// Without what takes the CPU minutes, unless it was asked for.
    pub fn for_software(&self, arguments: &Arguments) -> Self {
        let mut sizes = self.clone();
        sizes.lengths.retain(|&keys| !arguments.lengths.is_empty() || keys <= 128 * K);
        sizes.tokens.retain(|&tokens| !arguments.tokens.is_empty() || tokens <= 1 << 20);
        sizes
    }

    fn full() -> Self {
        Self {
            lengths: [16, 32, 64, 128, 256, 512, 1024].map(|n| n * K).to_vec(),
            heads: vec![(32, 8), (32, 32)],
            head_dim: 128,
            ragged: [2, 4, 8, 16, 32, 64, 96, 128].map(|n| n * K).to_vec(),
            head_dims: vec![64, 256],
            head_dims_keys: 128 * K,
            append: 128 * K,
            tokens: [64, 1024, 4096, 12288].map(|n| n * K as u64).to_vec(),
            hashes: vec![(2, 2), (3, 3), (4, 4)],
            dtypes: vec!["bf16".into(), "f32".into()],
            race_heads: 4,
            steps: vec![(32, 1), (32, 64)],
            step_hashes: vec![(4, 4)],
            seconds: 0.15,
        }
    }

    fn quick() -> Self {
        Self {
            lengths: vec![2 * K, 4 * K],
            heads: vec![(4, 2), (2, 2)],
            head_dim: 64,
            ragged: vec![1100, 2 * K],
            head_dims: vec![32],
            head_dims_keys: 2 * K,
            append: 2 * K,
            tokens: vec![256, 512],
            hashes: vec![(2, 2)],
            steps: vec![(2, 1), (2, 3)],
            seconds: 0.005,
            ..Self::full()
        }
    }
}

fn take<T>(from: &mut Vec<T>, given: Vec<T>) {
    if !given.is_empty() {
        *from = given;
    }
}
