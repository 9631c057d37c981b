//! The one error type: every variant names the operation, the values found and the limit they broke.

use crate::tensor::DType;

/// What every fallible call of this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an operation was refused or failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor's shape does not fit the operation.
    #[error("{op}: {tensor} has shape {got:?}, expected {expected}")]
    Shape {
        /// The operation that refused.
        op: &'static str,
        /// The tensor's name in that operation.
        tensor: &'static str,
        /// The shape found.
        got: Vec<usize>,
        /// The shape needed, in words.
        expected: String,
    },
    /// A tensor's element type does not fit the operation.
    #[error("{op}: {tensor} has dtype {got:?}, expected {expected}")]
    DType {
        /// The operation that refused.
        op: &'static str,
        /// The tensor's name in that operation.
        tensor: &'static str,
        /// The dtype found.
        got: DType,
        /// The dtypes allowed, in words.
        expected: String,
    },
    /// A view reaches outside its storage.
    #[error("{op}: {tensor} needs {needed} elements of storage but has {available}")]
    OutOfBounds {
        /// The operation that refused.
        op: &'static str,
        /// The tensor's name in that operation.
        tensor: &'static str,
        /// Elements that shape and strides reach.
        needed: u64,
        /// Elements the storage holds.
        available: u64,
    },
    /// A configuration field is outside its range.
    #[error("configuration: {field} = {value}, {limit}")]
    Config {
        /// Name of the field.
        field: &'static str,
        /// Value given.
        value: String,
        /// The rule it breaks.
        limit: String,
    },
    /// A count passes what the operation or the device can hold.
    #[error("{op}: {what} = {value} passes the limit of {limit}")]
    Limit {
        /// The operation that refused.
        op: &'static str,
        /// What was counted.
        what: &'static str,
        /// The count.
        value: u64,
        /// The largest count allowed.
        limit: u64,
    },
    /// A sequence index that the cache does not have.
    #[error("{op}: sequence {index} does not exist, the cache has {count}")]
    NoSuchSequence {
        /// The operation that refused.
        op: &'static str,
        /// The index given.
        index: usize,
        /// Sequences in the cache.
        count: usize,
    },
    /// NaN or infinity in a tensor given as a host slice.
    #[error("{op}: {tensor} holds a NaN or infinite value at [batch, token, head, channel] = {index:?}")]
    NonFinite {
        /// The operation that refused.
        op: &'static str,
        /// The tensor's name in that operation.
        tensor: &'static str,
        /// Where the first one is.
        index: [usize; 4],
    },
    /// No adapter fits the request.
    #[error("no GPU adapter: wanted {wanted}; found: {found}")]
    NoAdapter {
        /// What was asked for.
        wanted: String,
        /// The adapters seen, in words.
        found: String,
    },
    /// The adapter or lent device lacks what the kernels need.
    #[error("device: {what} is {got}, the kernels need {needed}")]
    Requirement {
        /// The feature or limit.
        what: String,
        /// What the device has.
        got: String,
        /// What is needed.
        needed: String,
    },
    /// The GPU device is gone; nothing on it can be read any more.
    #[error("{op}: the device is lost ({reason})")]
    DeviceLost {
        /// The operation under way.
        op: &'static str,
        /// The driver's word.
        reason: String,
    },
    /// An allocation failed; what was held before is unchanged.
    #[error("{op}: out of memory asking for {bytes} bytes{}", of_memory(*.limit))]
    OutOfMemory {
        /// The operation under way.
        op: &'static str,
        /// Bytes asked for.
        bytes: u64,
        /// Bytes that the device has in all, where it says so.
        limit: Option<u64>,
    },
    /// The GPU runtime refused something that the plan held to be right.
    #[error("{op}: {message}")]
    Gpu {
        /// The operation under way.
        op: &'static str,
        /// The runtime's message.
        message: String,
    },
    /// Tensor and operation live on different devices.
    #[error("{op}: {tensor} lives on {got}, the operation runs on {expected}")]
    WrongDevice {
        /// The operation that refused.
        op: &'static str,
        /// The tensor's name in that operation.
        tensor: &'static str,
        /// Where the tensor is.
        got: &'static str,
        /// Where the operation runs.
        expected: &'static str,
    },
    /// This path cannot do it, and says what can.
    #[error("{op}: not supported: {why}")]
    Unsupported {
        /// The operation that refused.
        op: &'static str,
        /// What is missing and what to do instead.
        why: String,
    },
    /// A stream stopped: its source or its sink gave up, or the library refused or failed.
    #[error("{op}: stopped at token {position}: {cause}")]
    Stream {
        /// The stream.
        op: &'static str,
        /// The first token that is not done; in a stream that runs backwards, the end of those that are not.
        position: u64,
        /// Why. An [`Error`] of this crate, or what the source or the sink said.
        #[source]
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A stream stopped because its caller said so.
    #[error("{op}: cancelled at token {position}")]
    Cancelled {
        /// The stream.
        op: &'static str,
        /// As in [`Error::Stream`].
        position: u64,
    },
    /// A saved file that cannot be used.
    #[error("{op}: {reason}")]
    File {
        /// `save` or `load`.
        op: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

fn of_memory(limit: Option<u64>) -> String {
    limit.map_or_else(String::new, |limit| format!(", where the device has {limit} in all"))
}

impl Error {
    /// An allocation that failed on a device that does not say how much it has.
    pub(crate) fn out_of_memory(op: &'static str, bytes: u64) -> Self {
        Self::OutOfMemory { op, bytes, limit: None }
    }

    /// Shorthand for [`Error::Config`].
    pub(crate) fn config(field: &'static str, value: impl ToString, limit: impl ToString) -> Self {
        Self::Config { field, value: value.to_string(), limit: limit.to_string() }
    }
}
