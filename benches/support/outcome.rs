//! What a measurement can come to.

pub type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// A result that is not what it should be: no time is reported of it.
#[derive(Debug)]
pub struct Wrong(pub String);

impl std::fmt::Display for Wrong {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: no times are taken", self.0)
    }
}

impl std::error::Error for Wrong {}
