//! The structs that kernels read, field for field; a test compares the sizes.

use crate::engine::cuda::Strides;
use bytemuck::{Pod, Zeroable};

/// Twin of `Walk` in shaders/cuda/race/walk.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub(super) struct Walk {
    pub q: Strides,
    pub k: Strides,
    pub v: Strides,
    pub g: Strides,
    pub planes_stride: u64,
    pub batch: u32,
    pub tokens: u32,
    pub q_heads: u32,
    pub kv_heads: u32,
    pub span: u32,
    pub spans: u32,
}

/// Twin of `Scan` in shaders/cuda/race/scan.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub(super) struct Scan {
    pub state_batch: u64,
    pub state_head: u64,
    pub spans: u32,
    pub slots: u32,
    pub group: u32,
    pub heads: u32,
    pub keep: u32,
    pub reserved: u32,
}

/// Twin of `Shares` in shaders/cuda/race/add_parameters.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub(super) struct Shares {
    pub parts: u32,
    pub heads: u32,
    pub heads_of_set: u32,
    pub elements: u32,
    pub set_step: u64,
}

/// Twin of `Piece` in shaders/cuda/race/any/any.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub(super) struct PieceParams {
    pub x: Strides,
    pub y: Strides,
    pub out_batch: u64,
    pub out_token: u64,
    pub planes_step: u64,
    pub batch: u32,
    pub tokens: u32,
    pub head: u32,
    pub heads: u32,
    pub chunks: u32,
    pub slots: u32,
    pub flags: u32,
    pub share: u32,
    pub scale: f32,
    pub reserved: u32,
}

/// Twin of `Groups` in shaders/cuda/race/any/groups.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub(super) struct Groups {
    pub units: u32,
    pub chunks: u32,
    pub groups: u32,
    pub reserved: u32,
}

/// Twin of `Step` in shaders/cuda/race/any/step.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub(super) struct Step {
    pub q_batch: u64,
    pub q_head: u64,
    pub k_batch: u64,
    pub k_head: u64,
    pub v_batch: u64,
    pub v_head: u64,
    pub planes_step: u64,
    pub kv_heads: u32,
    pub scale: f32,
}

/// Twin of `Finish` in shaders/cuda/race/any/finish_parameters.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub(super) struct Finish {
    pub sets: u32,
    pub plane_sets: u32,
    pub betas: u32,
    pub reserved: u32,
}
