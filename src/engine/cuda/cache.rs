//! Compiled kernels on disk. Nothing here fails a caller: what cannot be read is compiled, what cannot be written is
//! compiled again the next time.

use crate::engine::seal::{sealed, unsealed};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Environment variable: a folder, or `0`, `false` or `off` for none.
const VARIABLE: &str = "SOFTHASH_KERNEL_CACHE";

/// Bytes of the largest entry; kernels take some hundred KiB.
const LARGEST: u64 = 64 << 20;

/// Where compiled kernels are kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Place {
    /// What the environment variable says, else the user's cache directory.
    #[default]
    Default,
    /// Nowhere.
    Off,
    Folder(PathBuf),
}

/// A folder of compiled kernels, or none.
#[derive(Debug)]
pub(super) struct DiskCache(Option<PathBuf>);

impl DiskCache {
    pub fn new(place: Place) -> Self {
        Self(match place {
            Place::Off => None,
            Place::Folder(folder) => Some(folder),
            Place::Default => match std::env::var(VARIABLE).ok().filter(|value| !value.is_empty()) {
                Some(value) if ["0", "false", "off"].contains(&value.as_str()) => None,
                Some(folder) => Some(folder.into()),
                None => of_user(),
            },
        })
    }

    pub fn folder(&self) -> Option<&Path> {
        self.0.as_deref()
    }

    fn file(&self, key: &str) -> Option<PathBuf> {
        self.0.as_ref().map(|folder| folder.join(format!("{key}.cubin")))
    }

    /// The code kept under `key`, if it is whole.
    pub fn load(&self, key: &str) -> Option<Vec<u8>> {
        let file = self.file(key)?;
        let found = std::fs::metadata(&file).ok()?;
        // Anything else was put there by others, and reading it might not end.
        let is_entry = found.is_file() && found.len() <= LARGEST;
        let data = if is_entry { std::fs::read(&file).ok()? } else { Vec::new() };
        let code = unsealed(&data);
        if code.is_none() {
            tracing::warn!(file = %file.display(), "a damaged kernel cache entry is made anew");
        }
        code.map(<[u8]>::to_vec)
    }

    /// Keeps `code` under `key`: whole, or not at all.
    pub fn store(&self, key: &str, code: &[u8]) {
        if let Some(file) = self.file(key)
            && let Err(error) = write(&file, &sealed(code))
        {
            tracing::debug!(file = %file.display(), %error, "a compiled kernel is not kept");
        }
    }
}

/// In the user's cache directory.
fn of_user() -> Option<PathBuf> {
    use etcetera::BaseStrategy;
    Some(etcetera::choose_base_strategy().ok()?.cache_dir().join("softhash").join("kernels"))
}

fn write(file: &Path, data: &[u8]) -> std::io::Result<()> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    if let Some(folder) = file.parent() {
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true);
        // The driver runs what is in there.
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder.create(folder)?;
    }
    // A name of its own for every writer, and a rename, which readers see done or not done.
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let part = file.with_extension(format!("{}-{number}.part", std::process::id()));
    let written = std::fs::File::create_new(&part).and_then(|mut to| {
        to.write_all(data)?;
        // A rename may reach the disk before the content does.
        to.sync_all()
    });
    let done = written.and_then(|()| std::fs::rename(&part, file));
    if done.is_err() {
        let _ = std::fs::remove_file(&part);
    }
    done
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_whole_or_not_there() {
        let folder = tempfile::tempdir().unwrap();
        let cache = DiskCache::new(Place::Folder(folder.path().join("deep").join("down")));
        assert_eq!(cache.load("a"), None);
        cache.store("a", b"code");
        cache.store("a", b"other code");
        assert_eq!(cache.load("a").as_deref(), Some(&b"other code"[..]));
        let file = cache.file("a").unwrap();
        let whole = std::fs::read(&file).unwrap();
        for bytes in [&whole[..whole.len() - 1], &whole[..5], &[]] {
            std::fs::write(&file, bytes).unwrap();
            assert_eq!(cache.load("a"), None);
        }
        // Larger than memory, and no file at all.
        std::fs::File::create(&file).unwrap().set_len(1 << 44).unwrap_or_default();
        assert_eq!(cache.load("a"), None);
        std::fs::remove_file(&file).unwrap();
        std::fs::create_dir(&file).unwrap();
        assert_eq!(cache.load("a"), None);
        cache.store("a", b"code");
        assert_eq!(cache.load("a"), None);
        std::fs::remove_dir(&file).unwrap();
        cache.store("a", b"code");
        assert_eq!(cache.load("a").as_deref(), Some(&b"code"[..]));
        assert_eq!(std::fs::read_dir(file.parent().unwrap()).unwrap().count(), 1, "no parts are left");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            assert_eq!(std::fs::metadata(file.parent().unwrap()).unwrap().permissions().mode() & 0o77, 0);
        }
    }

    #[test]
    fn what_cannot_be_kept_is_no_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let cache = DiskCache::new(Place::Folder(file.path().join("below a file")));
        cache.store("a", b"code");
        assert_eq!(cache.load("a"), None);
        let off = DiskCache::new(Place::Off);
        off.store("a", b"code");
        assert_eq!((off.load("a"), off.folder()), (None, None));
    }

    #[test]
    fn many_writers_leave_one_whole_entry() {
        let folder = tempfile::tempdir().unwrap();
        let cache = DiskCache::new(Place::Folder(folder.path().into()));
        std::thread::scope(|scope| {
            for i in 0..8u8 {
                let cache = &cache;
                scope.spawn(move || (0..20).for_each(|_| cache.store("a", &vec![i; 5000])));
            }
            for _ in 0..200 {
                assert!(cache.load("a").is_none_or(|code| code.len() == 5000));
            }
        });
        let code = cache.load("a").unwrap();
        assert!(code.iter().all(|byte| *byte == code[0]));
    }
}
