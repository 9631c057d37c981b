//! Choosing, lending and reporting devices. The tests with `llvmpipe` fail where lavapipe is not installed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use softhash::{Device, Error};

/// Runs `print_auto` of this file in a process of its own, under the given environment.
fn auto_under(environment: &[(&str, &str)]) -> String {
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "print_auto", "--ignored", "--nocapture"]);
    command.env_remove("SOFTHASH_DEVICE").env_remove("SOFTHASH_CHECKED").envs(environment.iter().copied());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
#[ignore = "run by other tests"]
fn print_auto() {
    match Device::auto() {
        Ok(device) => println!("{}", device.report()),
        Err(error) => println!("error: {error}"),
    }
}

#[test]
fn the_cpu_is_always_there() {
    let device = Device::cpu();
    assert!(device.is_cpu());
    assert_eq!(device.path_name(), "cpu");
    let report = device.report();
    assert_eq!((report.path, report.gpu.is_none(), report.kernels.len()), ("cpu", true, 0));
    assert!(report.threads > 0);
    assert!(report.to_string().starts_with("path: cpu (asked for)"));
    assert_eq!((device.pipeline_cache_data(), device.pipeline_cache_key()), (None, None));
    for name in ["cpu", "CPU"] {
        assert!(Device::by_name(name).unwrap().is_cpu());
    }
    let last = Device::enumerate().pop().unwrap();
    assert_eq!((last.name.as_str(), last.software), ("cpu", true));
}

#[test]
fn a_missing_adapter_is_an_error_that_lists_what_there_is() {
    let error = Device::by_name("no such adapter").unwrap_err();
    let Error::NoAdapter { wanted, found } = &error else { panic!("{error}") };
    assert!(wanted.contains("no such adapter"), "{wanted}");
    for adapter in Device::enumerate() {
        assert!(found.contains(&adapter.name), "{found} lacks {adapter}");
    }
}

#[test]
fn the_environment_names_the_device() {
    assert!(auto_under(&[("SOFTHASH_DEVICE", "cpu")]).contains("path: cpu (asked for by SOFTHASH_DEVICE)"));
    let error = auto_under(&[("SOFTHASH_DEVICE", "no such adapter")]);
    assert!(error.contains("error: no GPU adapter: wanted \"no such adapter\""), "{error}");
}

#[test]
fn auto_takes_real_gpus_only_and_says_why() {
    let real = Device::enumerate().into_iter().find(|adapter| !adapter.software);
    for environment in [&[][..], &[("SOFTHASH_DEVICE", "")]] {
        let report = auto_under(environment);
        match &real {
            Some(adapter) => assert!(report.contains(&format!("adapter: {}", adapter.name)), "{report}"),
            None => assert!(report.contains("path: cpu (no GPU") || report.contains("path: cpu (built"), "{report}"),
        }
    }
}

/// CUDA, then GPUs of the wgpu path, then software, then the CPU.
#[test]
fn devices_are_listed_in_the_order_of_choice() {
    let all = Device::enumerate();
    let rank = |adapter: &softhash::AdapterSummary| match (adapter.backend.as_str(), adapter.software) {
        ("Cuda", _) => 0,
        ("cpu", _) => 3,
        (_, false) => 1,
        (_, true) => 2,
    };
    assert!(all.is_sorted_by_key(rank), "{all:?}");
    let path = match rank(&all[0]) {
        0 => "path: cuda (the best GPU found)",
        1 => "path: gpu (the best GPU found)",
        _ => "path: cpu (",
    };
    let report = auto_under(&[]);
    assert!(report.contains(path), "{report}");
    // A name goes before the order.
    for adapter in all.iter().filter(|adapter| adapter.backend == "Cuda") {
        let report = auto_under(&[("SOFTHASH_DEVICE", &adapter.name)]);
        assert!(report.contains(&format!("adapter: {}", adapter.name)), "{report}");
        assert!(auto_under(&[("SOFTHASH_DEVICE", "cpu")]).contains("path: cpu"));
    }
}

#[cfg(feature = "wgpu")]
#[path = "common/instance.rs"]
mod instance;

#[cfg(feature = "wgpu")]
mod gpu {
    use super::auto_under;
    use super::instance::instance;
    use softhash::{
        CacheShape, DEFAULT_PAGE_TOKENS, DType, Device, DeviceOptions, Error, SocketCache, SocketConfig, wgpu,
    };
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const SOFTWARE: &str = "llvmpipe";

    fn adapter() -> wgpu::Adapter {
        pollster::block_on(instance().enumerate_adapters(wgpu::Backends::all()))
            .into_iter()
            .find(|adapter| adapter.get_info().name.contains(SOFTWARE))
            .expect("these tests need lavapipe (Debian: mesa-vulkan-drivers)")
    }

    /// A device as a host has it, its two handlers counting.
    struct Host {
        info: wgpu::AdapterInfo,
        device: wgpu::Device,
        queue: wgpu::Queue,
        errors: Arc<AtomicUsize>,
        losses: Arc<AtomicUsize>,
    }

    impl Host {
        fn new(required_features: wgpu::Features, required_limits: wgpu::Limits) -> Self {
            let adapter = adapter();
            let request = wgpu::DeviceDescriptor { required_features, required_limits, ..Default::default() };
            let (device, queue) = pollster::block_on(adapter.request_device(&request)).unwrap();
            let (errors, losses) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
            let (error, loss) = (errors.clone(), losses.clone());
            device.on_uncaptured_error(Arc::new(move |_| {
                error.fetch_add(1, Ordering::SeqCst);
            }));
            device.set_device_lost_callback(move |_, _| {
                loss.fetch_add(1, Ordering::SeqCst);
            });
            Self { info: adapter.get_info(), device, queue, errors, losses }
        }

        fn lend(&self) -> softhash::Result<Device> {
            Device::from_wgpu(&self.info, self.device.clone(), self.queue.clone())
        }

        fn blunder(&self) {
            self.queue.write_buffer(
                &self.device.create_buffer(&wgpu::BufferDescriptor {
                    label: None,
                    size: 4,
                    usage: wgpu::BufferUsages::STORAGE,
                    mapped_at_creation: false,
                }),
                0,
                &[0; 4],
            );
        }
    }

    #[test]
    fn software_is_found_by_name_only() {
        let all = Device::enumerate();
        let listed = all.iter().find(|a| a.name.contains(SOFTWARE)).expect("lavapipe is not installed");
        assert!(listed.software && listed.backend == "Vulkan" && listed.device_type == "Cpu", "{listed:?}");
        assert!(!listed.driver.is_empty());
        for name in [SOFTWARE, "LLVMpipe"] {
            let device = Device::by_name(name).unwrap();
            assert_eq!((device.is_cpu(), device.path_name()), (false, "gpu"));
            let report = device.report();
            let gpu = report.gpu.as_ref().unwrap();
            assert_eq!((&gpu.adapter, gpu.software, gpu.checked), (&listed.name, true, false));
            assert_eq!((gpu.f16, gpu.subgroups, gpu.timestamps), (true, Some((8, 8)), true));
            assert!(gpu.workgroup_memory >= 16384 && gpu.max_invocations >= 256);
            let text = report.to_string();
            for part in ["path: gpu (asked for by name)", SOFTWARE, "shaders: unchecked", "f16: yes", "subgroups: 8"] {
                assert!(text.contains(part), "{part} is not in\n{text}");
            }
        }
        let report = auto_under(&[("SOFTHASH_DEVICE", SOFTWARE)]);
        assert!(report.contains("path: gpu (asked for by SOFTHASH_DEVICE)"), "{report}");
        if all.iter().all(|adapter| adapter.software) {
            let report = auto_under(&[]);
            assert!(report.contains("computes in software and was not asked for"), "{report}");
        }
    }

    /// Drivers that load libraries with each instance and unload them with it do not stand that.
    #[test]
    fn many_threads_may_look_for_devices_at_once() {
        let listed = Device::enumerate();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..4 {
                        assert_eq!(Device::enumerate(), listed);
                        assert!(Device::by_name("no such adapter").is_err());
                        drop(Device::auto().unwrap());
                    }
                });
            }
        });
    }

    #[test]
    fn the_asynchronous_twins_agree() {
        let wait = pollster::block_on::<std::pin::Pin<Box<dyn Future<Output = Device>>>>;
        let by_name = wait(Box::pin(async { Device::by_name_async(SOFTWARE).await.unwrap() }));
        let options = DeviceOptions::new().name(SOFTWARE);
        let opened = wait(Box::pin(async { Device::open_async(options).await.unwrap() }));
        for device in [by_name, opened] {
            assert!(device.report().gpu.unwrap().adapter.contains(SOFTWARE));
        }
        let auto = wait(Box::pin(async { Device::auto_async().await.unwrap() }));
        assert_eq!(auto.report(), Device::auto().unwrap().report());
        let all = pollster::block_on(Device::enumerate_async());
        assert_eq!(all, Device::enumerate());
        let text = all.last().unwrap().to_string();
        assert_eq!(text, "cpu (cpu, Cpu)");
    }

    /// The report names each kernel once it is compiled, and what its variant uses.
    #[test]
    fn the_report_names_kernels_and_variants() {
        let uses_subgroups = |checked: bool| {
            let device = Device::open(DeviceOptions::new().name(SOFTWARE).checked(checked)).unwrap();
            assert!(device.report().to_string().contains("kernels: none compiled yet"));
            let shape = CacheShape { num_q_heads: 2, num_kv_heads: 1, head_dim: 8, value_dim: 8, dtype: DType::F32 };
            let cache = SocketCache::new(&device, SocketConfig::fast(), shape, 1).unwrap();
            assert_eq!(cache.page_tokens(), DEFAULT_PAGE_TOKENS);
            cache.warm_up(DType::F32, DType::F32).unwrap();
            let report = device.report();
            assert!(report.kernels.is_sorted_by(|a, b| a.label < b.label));
            assert!(report.kernels.iter().all(|kernel| !kernel.f16), "halves are unpacked from integers");
            let text = report.to_string();
            for kernel in &report.kernels {
                let mark = if kernel.subgroups { " [subgroups]" } else { "" };
                assert!(text.contains(&format!("\n  {}{mark}", kernel.label)), "{text}");
            }
            report.kernels.iter().filter(|kernel| kernel.subgroups).count()
        };
        assert_eq!(uses_subgroups(true), 0);
        assert!(uses_subgroups(false) > 0);
    }

    #[test]
    fn checks_are_chosen_by_option_then_environment() {
        let checked = |options: DeviceOptions| Device::open(options).unwrap().report().gpu.unwrap().checked;
        assert!(checked(DeviceOptions::new().name(SOFTWARE).checked(true)));
        assert!(!checked(DeviceOptions::new().name(SOFTWARE).checked(false)));
        for (value, word) in [("1", "checked"), ("0", "unchecked")] {
            let report = auto_under(&[("SOFTHASH_DEVICE", SOFTWARE), ("SOFTHASH_CHECKED", value)]);
            assert!(report.contains(&format!("shaders: {word}")), "{report}");
        }
        let host = Host::new(wgpu::Features::empty(), wgpu::Limits::defaults());
        assert!(host.lend().unwrap().report().gpu.unwrap().checked);
        let options = DeviceOptions::new().checked(false);
        let lent = Device::from_wgpu_with(&host.info, host.device.clone(), host.queue.clone(), options).unwrap();
        assert!(!lent.report().gpu.unwrap().checked);
    }

    #[test]
    fn requirements_can_be_requested_and_fulfil_what_is_needed() {
        let wants = Device::requirements(&adapter());
        assert!(wants.required_features.is_empty());
        assert!(wants.optional_features.contains(wgpu::Features::SHADER_F16 | wgpu::Features::SUBGROUP));
        assert!(wants.required_limits.max_storage_buffers_per_shader_stage >= 8);
        let host = Host::new(wants.required_features | wants.optional_features, wants.required_limits.clone());
        let gpu = host.lend().unwrap().report().gpu.unwrap();
        assert!(gpu.f16 && gpu.subgroups.is_some() && gpu.timestamps && gpu.pipeline_cache);
        assert_eq!(gpu.max_buffer, wants.required_limits.max_buffer_size);
    }

    #[test]
    fn a_plain_device_is_enough_and_a_lesser_one_is_refused() {
        let gpu = Host::new(wgpu::Features::empty(), wgpu::Limits::defaults()).lend().unwrap().report().gpu.unwrap();
        assert_eq!((gpu.f16, gpu.subgroups, gpu.timestamps, gpu.pipeline_cache), (false, None, false, false));
        let error = Host::new(wgpu::Features::empty(), wgpu::Limits::downlevel_defaults()).lend().unwrap_err();
        let Error::Requirement { what, got, needed } = &error else { panic!("{error}") };
        assert_eq!((what.as_str(), got.as_str()), ("limit max_storage_buffers_per_shader_stage", "4"));
        assert_eq!(needed, "at least 8");
    }

    #[test]
    fn the_hosts_handlers_stay_in_place() {
        let host = Host::new(wgpu::Features::empty(), wgpu::Limits::defaults());
        let device = host.lend().unwrap();
        let (lent, _) = device.as_wgpu().unwrap();
        assert_eq!(lent, &host.device);
        assert_eq!(host.errors.load(Ordering::SeqCst), 0);
        host.blunder();
        assert_eq!(host.errors.load(Ordering::SeqCst), 1);
        host.device.destroy();
        host.device.poll(wgpu::PollType::Poll).unwrap();
        assert_eq!(host.losses.load(Ordering::SeqCst), 1);
        assert!(matches!(host.lend().unwrap_err(), Error::DeviceLost { .. }));
        assert_eq!(host.errors.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn pipeline_cache_data_goes_round() {
        let device = Device::by_name(SOFTWARE).unwrap();
        assert!(device.pipeline_cache_key().is_some_and(|key| key.contains("vulkan")));
        let data = device.pipeline_cache_data().unwrap();
        for data in [data, b"not a cache".to_vec()] {
            let again = Device::open(DeviceOptions::new().name(SOFTWARE).pipeline_cache(data)).unwrap();
            assert!(again.pipeline_cache_data().is_some());
        }
        let bare = Host::new(wgpu::Features::empty(), wgpu::Limits::defaults()).lend().unwrap();
        assert_eq!((bare.pipeline_cache_data(), bare.pipeline_cache_key()), (None, None));
    }

    #[test]
    fn a_device_outlives_nothing_it_needs_and_clones_are_one() {
        let device = Device::by_name(SOFTWARE).unwrap();
        let clone = device.clone();
        let (a, b) = (device.as_wgpu().unwrap().0.clone(), clone.as_wgpu().unwrap().0.clone());
        assert_eq!(a, b);
        drop(device);
        assert!(clone.timer(1).unwrap().is_some());
        assert!(matches!(clone.timer(0).unwrap_err(), Error::Limit { .. }));
        a.destroy();
        assert!(matches!(clone.timer(1).unwrap_err(), Error::DeviceLost { .. }));
        assert!(Device::cpu().timer(1).unwrap().is_none());
    }
}
