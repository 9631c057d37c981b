//! What is tested of every kernel's text: it is parsed, validated, checked against its bindings and limits, and written
//! as SPIR-V, MSL and HLSL.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use super::{Binding, KernelKey};
use naga::valid::{Capabilities, ValidationFlags, Validator};
use std::collections::BTreeMap;

/// Bytes of workgroup memory that every device has.
pub(crate) const WORKGROUP_MEMORY: u32 = 16 << 10;

/// Offsets of a struct's fields, and its size.
pub(crate) type Layout = (BTreeMap<String, usize>, usize);

pub(crate) fn parse(key: &dyn KernelKey) -> naga::Module {
    let source = key.source();
    naga::front::wgsl::parse_str(&source.wgsl)
        .unwrap_or_else(|e| panic!("{}: {}", key.label(), e.emit_to_string(&source.wgsl)))
}

pub(crate) fn validates_and_translates(key: &dyn KernelKey) {
    let label = key.label();
    let module = parse(key);
    // Half floats unpacked from integers are core WebGPU; subgroups are a variant of their own.
    let mut validator =
        Validator::new(ValidationFlags::all(), Capabilities::SHADER_FLOAT16_IN_FLOAT32 | Capabilities::SUBGROUP);
    let info =
        validator.validate(&module).unwrap_or_else(|e| panic!("{label}: {}", e.emit_to_string(&key.source().wgsl)));
    let options = naga::back::spv::Options { lang_version: (1, 3), ..Default::default() };
    let spirv = naga::back::spv::write_vec(&module, &info, &options, None).unwrap();
    assert!(!spirv.is_empty(), "{label}");
    let options = naga::back::msl::Options { fake_missing_bindings: true, ..Default::default() };
    let (msl, _) =
        naga::back::msl::write_string(&module, &info, &options, &naga::back::msl::PipelineOptions::default())
            .unwrap_or_else(|e| panic!("{label}: {e}"));
    assert!(msl.contains("kernel void"), "{label}");
    let options = naga::back::hlsl::Options { fake_missing_bindings: true, ..Default::default() };
    let mut hlsl = String::new();
    naga::back::hlsl::Writer::new(&mut hlsl, &options, &naga::back::hlsl::PipelineOptions::default())
        .write(&module, &info, None)
        .unwrap_or_else(|e| panic!("{label}: {e}"));
    assert!(hlsl.contains("numthreads"), "{label}");
}

pub(crate) fn stays_in_limits(key: &dyn KernelKey, workgroup_memory: u32) {
    let (label, module, bindings) = (key.label(), parse(key), key.source().bindings);
    let mut layouter = naga::proc::Layouter::default();
    layouter.update(module.to_ctx()).unwrap();
    let mut storage = 0;
    let mut workgroup = 0;
    for (_, variable) in module.global_variables.iter() {
        match variable.space {
            naga::AddressSpace::WorkGroup => workgroup += layouter[variable.ty].size.next_multiple_of(16),
            naga::AddressSpace::Storage { access } => {
                storage += 1;
                let written = access.contains(naga::StorageAccess::STORE);
                let place = variable.binding.as_ref().unwrap().binding as usize;
                let expected = if written { Binding::ReadWrite } else { Binding::Read };
                assert_eq!(bindings[place], expected, "{label}: binding {place}");
            }
            naga::AddressSpace::Uniform => {
                assert_eq!(bindings[0], Binding::Uniform { size: layouter[variable.ty].size.into() }, "{label}");
            }
            _ => {}
        }
    }
    assert_eq!(storage + 1, bindings.len(), "{label}: unused bindings");
    assert!(storage <= 7, "{label}: {storage} storage buffers");
    assert!(workgroup <= workgroup_memory, "{label}: {workgroup} bytes of workgroup memory");
}

/// The structs of all kernels' texts, by name.
pub(crate) fn structs<'a>(keys: impl Iterator<Item = &'a dyn KernelKey>) -> BTreeMap<String, Layout> {
    let mut seen = BTreeMap::new();
    for key in keys {
        for (_, ty) in parse(key).types.iter() {
            if let (Some(name), naga::TypeInner::Struct { members, span }) = (&ty.name, &ty.inner) {
                let fields = members.iter().map(|m| (m.name.clone().unwrap(), m.offset as usize)).collect();
                seen.insert(name.clone(), (fields, *span as usize));
            }
        }
    }
    seen
}

/// Compares the offsets of fields, given as `rust.path => "wgsl_name"`, or as a name that both sides share.
macro_rules! same_layout {
    ($layouts:expr, $name:literal, $ty:ty, [$($field:ident),* $(,)?] $(, $($inner:ident).+ => $wgsl:literal)* $(,)?) => {
        let (fields, span): &$crate::engine::gpu::shader_tests::Layout = &$layouts[$name];
        assert_eq!(*span, size_of::<$ty>(), $name);
        $(assert_eq!(fields.get(stringify!($field)), Some(&std::mem::offset_of!($ty, $field)), "{}.{}", $name, stringify!($field));)*
        $(assert_eq!(fields.get($wgsl), Some(&std::mem::offset_of!($ty, $($inner).+)), "{}.{}", $name, $wgsl);)*
    };
}
pub(crate) use same_layout;
