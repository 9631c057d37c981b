//! A thread for what would block the thread that polls a future.

use super::lock;
use futures::channel::oneshot;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;

type Job = Box<dyn FnOnce() + Send>;

/// Runs jobs one after another on a thread of its own, which starts with the first and ends with its owner.
#[derive(Debug, Default)]
pub(crate) struct Waiter(Mutex<Option<Thread>>);

#[derive(Debug)]
struct Thread {
    jobs: mpsc::Sender<Job>,
    handle: JoinHandle<()>,
}

/// The thread ends before its owner does: one that a driver has served must be gone when the driver is unloaded.
impl Drop for Waiter {
    fn drop(&mut self) {
        let Some(Thread { jobs, handle }) = self.0.get_mut().unwrap_or_else(PoisonError::into_inner).take() else {
            return;
        };
        drop(jobs);
        // The last owner can be a job of the thread itself, which ends on its own then.
        if handle.thread().id() != std::thread::current().id() {
            // Its panics were taken job by job.
            let _ = handle.join();
        }
    }
}

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
        let mut thread = lock(&self.0);
        if thread.is_none() {
            let (jobs, receiver) = mpsc::channel::<Job>();
            let run = move || receiver.into_iter().for_each(|job| job());
            let spawned = std::thread::Builder::new().name("softhash waiter".into()).spawn(run);
            *thread = spawned.ok().map(|handle| Thread { jobs, handle });
        }
        match &*thread {
            Some(Thread { jobs, .. }) => jobs.send(job).err().map(|refused| refused.0),
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

    #[test]
    fn the_thread_is_gone_when_its_owner_is() {
        use std::sync::Arc;
        /// Notes that its thread's own values have been dropped.
        struct Last(Arc<std::sync::atomic::AtomicBool>);
        impl Drop for Last {
            fn drop(&mut self) {
                std::thread::sleep(Duration::from_millis(20));
                self.0.store(true, std::sync::atomic::Ordering::SeqCst);
            }
        }
        thread_local!(static LAST: std::cell::RefCell<Option<Last>> = const { std::cell::RefCell::new(None) });
        let gone = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let (waiter, seen) = (Waiter::default(), gone.clone());
        wait(waiter.run(move || LAST.with(|last| *last.borrow_mut() = Some(Last(seen)))));
        drop(waiter);
        assert!(gone.load(std::sync::atomic::Ordering::SeqCst));
    }
}
