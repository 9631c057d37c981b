//! A thread for what would block the thread that polls a future.

use super::lock;
use futures::channel::oneshot;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, mpsc};

type Job = Box<dyn FnOnce() + Send>;

/// Runs jobs one after another on a thread of its own, which starts with the first and ends with its owner.
#[derive(Debug, Default)]
pub(crate) struct Waiter(Mutex<Option<mpsc::Sender<Job>>>);

impl Waiter {
    /// Resolves when `work` is done; `None` where it panicked. On the calling thread where there is no other to be had.
    pub async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        let (sender, done) = oneshot::channel();
        let job: Job = Box::new(move || {
            // A panic must not end the thread, on which others wait; it drops the sender, which is told below. Nobody
            // may be waiting any more, hence the ignored result.
            let _ = catch_unwind(AssertUnwindSafe(|| sender.send(work())));
        });
        if let Some(job) = self.send(job) {
            job();
        }
        done.await.ok()
    }

    /// Hands the job over, or back.
    fn send(&self, job: Job) -> Option<Job> {
        let mut jobs = lock(&self.0);
        if jobs.is_none() {
            let (sender, receiver) = mpsc::channel::<Job>();
            let run = move || receiver.into_iter().for_each(|job| job());
            if std::thread::Builder::new().name("softhash waiter".into()).spawn(run).is_ok() {
                *jobs = Some(sender);
            }
        }
        match &*jobs {
            Some(sender) => sender.send(job).err().map(|refused| refused.0),
            None => Some(job),
        }
    }
}

#[cfg(test)]
#[allow(clippy::panic)]
mod tests {
    use super::Waiter;
    use futures::FutureExt;
    use std::time::Duration;

    /// Polls until it is there: no runtime is at hand in every set of features.
    fn wait<T>(future: impl Future<Output = T>) -> T {
        let mut future = Box::pin(future);
        loop {
            match (&mut future).now_or_never() {
                Some(value) => return value,
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    #[test]
    fn jobs_run_elsewhere_and_survive_a_panic() {
        let waiter = Waiter::default();
        let here = std::thread::current().id();
        assert_eq!(wait(waiter.run(move || if here != here { 1 } else { panic!("planted") })), None);
        assert_eq!(wait(waiter.run(move || std::thread::current().id() != here)), Some(true));
    }
}
