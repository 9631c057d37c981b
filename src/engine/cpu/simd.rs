//! SIMD chosen at run time. Kernels are written once over [`Lanes`]: pulp's portable operations and the few that the
//! kernels need beside them.

use half::{bf16, f16};
use pulp::Simd;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{__m128i, __m256, __m256i, __m512};

/// Every row of numbers is padded with zeros to a multiple of this, which every vector length divides.
pub(crate) const ROW: usize = 16;

/// `n` rounded up to whole rows of lanes.
pub(crate) fn padded(n: usize) -> usize {
    n.next_multiple_of(ROW)
}

/// An instruction set. Slices handed to loads hold at least [`Simd::F32_LANES`] elements.
pub(crate) trait Lanes: Simd {
    /// Thirty-two vector registers rather than sixteen.
    const MANY_REGISTERS: bool;

    /// Zero-extends the elements at `x`.
    ///
    /// # Safety
    /// As many elements as there are lanes can be read from `x`.
    unsafe fn widen_u16(self, x: *const u16) -> Self::u32s;

    /// `table[index & 15]` in each lane.
    fn lookup(self, table: &[f32; 16], index: Self::u32s) -> Self::f32s;

    /// Bit i is set where lane i of `a` is at least that of `b`.
    fn at_least(self, a: Self::f32s, b: Self::f32s) -> u32;

    /// Writes the transpose of a block of [`ROW`] rows and columns.
    #[inline(always)]
    fn transpose(self, from: &[f32], from_stride: usize, to: &mut [f32], to_stride: usize) {
        for first in (0..ROW).step_by(4) {
            let rows: [&[f32]; 4] = std::array::from_fn(|r| &from[(first + r) * from_stride..][..ROW]);
            for column in 0..ROW {
                let to = &mut to[column * to_stride + first..][..4];
                for (to, row) in to.iter_mut().zip(rows) {
                    *to = row[column];
                }
            }
        }
    }

    #[inline(always)]
    fn load(self, x: &[f32]) -> Self::f32s {
        Self::as_simd_f32s(&x[..Self::F32_LANES]).0[0]
    }

    #[inline(always)]
    fn load_u32(self, x: &[u32]) -> Self::u32s {
        Self::as_simd_u32s(&x[..Self::F32_LANES]).0[0]
    }

    #[inline(always)]
    fn store(self, x: &mut [f32], value: Self::f32s) {
        Self::as_mut_simd_f32s(&mut x[..Self::F32_LANES]).0[0] = value;
    }

    #[inline(always)]
    fn shift_right(self, x: Self::u32s, by: u32) -> Self::u32s {
        self.wrapping_dyn_shr_u32s(x, self.splat_u32s(by))
    }

    #[inline(always)]
    fn shift_left(self, x: Self::u32s, by: u32) -> Self::u32s {
        self.wrapping_dyn_shl_u32s(x, self.splat_u32s(by))
    }

    /// Finite half-precision numbers to f32, exactly.
    ///
    /// # Safety
    /// As [`Lanes::widen_u16`].
    #[inline(always)]
    unsafe fn widen_f16(self, x: *const u16) -> Self::f32s {
        // SAFETY: the caller's promise.
        let h = unsafe { self.widen_u16(x) };
        let sign = self.shift_left(self.and_u32s(h, self.splat_u32s(0x8000)), 16);
        let magnitude = self.shift_left(self.and_u32s(h, self.splat_u32s(0x7fff)), 13);
        // Moving the bits keeps the number but for the exponent's bias, which is 112 less; the product repairs
        // subnormals too.
        let value =
            self.mul_f32s(self.transmute_f32s_u32s(magnitude), self.splat_f32s(f32::from_bits((127 + 112) << 23)));
        self.transmute_f32s_u32s(self.or_u32s(self.transmute_u32s_f32s(value), sign))
    }

    /// bfloat16 numbers to f32.
    ///
    /// # Safety
    /// As [`Lanes::widen_u16`].
    #[inline(always)]
    unsafe fn widen_bf16(self, x: *const u16) -> Self::f32s {
        // SAFETY: the caller's promise.
        let wide = unsafe { self.widen_u16(x) };
        self.transmute_f32s_u32s(self.shift_left(wide, 16))
    }

    #[inline(always)]
    fn magnitude(self, x: Self::f32s) -> Self::f32s {
        self.transmute_f32s_u32s(self.and_u32s(self.transmute_u32s_f32s(x), self.splat_u32s(0x7fff_ffff)))
    }

    /// eˣ for x ≤ 0 with a relative error below 2⁻²²; exactly 0 below −87, where f32 loses its normal numbers.
    #[inline(always)]
    fn exp(self, x: Self::f32s) -> Self::f32s {
        // Adding 1.5·2²³ rounds to a whole number, which the low bits then hold.
        let magic = self.splat_f32s(12_582_912.0);
        let lowest = self.splat_f32s(-87.0);
        let kept = self.greater_than_or_equal_f32s(x, lowest);
        let clamped = self.max_f32s(x, lowest);
        let shifted = self.mul_add_e_f32s(clamped, self.splat_f32s(std::f32::consts::LOG2_E), magic);
        let n = self.sub_f32s(shifted, magic);
        // ln 2 in two parts, the first with few bits so that its product with n is exact.
        let r = self.mul_add_e_f32s(n, self.splat_f32s(-0.693_359_4), clamped);
        let r = self.mul_add_e_f32s(n, self.splat_f32s(2.121_944_4e-4), r);
        let mut p = self.splat_f32s(1.0 / 720.0);
        for c in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            p = self.mul_add_e_f32s(p, r, self.splat_f32s(c));
        }
        let exponent = self.shift_left(self.transmute_u32s_f32s(shifted), 23);
        let scaled = self.add_u32s(self.transmute_u32s_f32s(p), exponent);
        self.transmute_f32s_u32s(self.select_u32s(kept, scaled, self.splat_u32s(0)))
    }
}

#[cfg(target_arch = "x86_64")]
impl Lanes for pulp::x86::V4 {
    const MANY_REGISTERS: bool = true;

    #[inline(always)]
    fn transpose(self, from: &[f32], from_stride: usize, to: &mut [f32], to_stride: usize) {
        let avx = self.avx512f;
        let mut rows: [__m512; ROW] = [avx._mm512_setzero_ps(); ROW];
        for (i, row) in rows.iter_mut().enumerate() {
            *row = pulp::cast(self.load(&from[i * from_stride..]));
        }
        // Fours of rows are transposed inside each quarter of a vector ...
        let mut fours = rows;
        for i in (0..ROW).step_by(4) {
            let a = avx._mm512_castps_pd(avx._mm512_unpacklo_ps(rows[i], rows[i + 1]));
            let b = avx._mm512_castps_pd(avx._mm512_unpacklo_ps(rows[i + 2], rows[i + 3]));
            let c = avx._mm512_castps_pd(avx._mm512_unpackhi_ps(rows[i], rows[i + 1]));
            let d = avx._mm512_castps_pd(avx._mm512_unpackhi_ps(rows[i + 2], rows[i + 3]));
            fours[i] = avx._mm512_castpd_ps(avx._mm512_unpacklo_pd(a, b));
            fours[i + 1] = avx._mm512_castpd_ps(avx._mm512_unpackhi_pd(a, b));
            fours[i + 2] = avx._mm512_castpd_ps(avx._mm512_unpacklo_pd(c, d));
            fours[i + 3] = avx._mm512_castpd_ps(avx._mm512_unpackhi_pd(c, d));
        }
        // ... then the quarters themselves: quarter q of fours[4f + c] holds column 4q + c of rows 4f to 4f + 3.
        for c in 0..4 {
            let (a, b, d, e) = (fours[c], fours[4 + c], fours[8 + c], fours[12 + c]);
            let (even, odd) = (avx._mm512_shuffle_f32x4::<0x88>(a, b), avx._mm512_shuffle_f32x4::<0xdd>(a, b));
            let (even2, odd2) = (avx._mm512_shuffle_f32x4::<0x88>(d, e), avx._mm512_shuffle_f32x4::<0xdd>(d, e));
            for (column, x) in [
                (c, avx._mm512_shuffle_f32x4::<0x88>(even, even2)),
                (c + 4, avx._mm512_shuffle_f32x4::<0x88>(odd, odd2)),
                (c + 8, avx._mm512_shuffle_f32x4::<0xdd>(even, even2)),
                (c + 12, avx._mm512_shuffle_f32x4::<0xdd>(odd, odd2)),
            ] {
                self.store(&mut to[column * to_stride..], pulp::cast(x));
            }
        }
    }

    #[inline(always)]
    unsafe fn widen_u16(self, x: *const u16) -> Self::u32s {
        // SAFETY: the caller's promise; the read is unaligned.
        let x = unsafe { x.cast::<__m256i>().read_unaligned() };
        pulp::cast(self.avx512f._mm512_cvtepu16_epi32(x))
    }

    #[inline(always)]
    unsafe fn widen_f16(self, x: *const u16) -> Self::f32s {
        // SAFETY: the caller's promise; the read is unaligned.
        let x = unsafe { x.cast::<__m256i>().read_unaligned() };
        pulp::cast(self.avx512f._mm512_cvtph_ps(x))
    }

    #[inline(always)]
    fn lookup(self, table: &[f32; 16], index: Self::u32s) -> Self::f32s {
        // SAFETY: the table is one vector long; the read is unaligned. A cast of the array would go by the stack.
        let table = unsafe { table.as_ptr().cast::<__m512>().read_unaligned() };
        pulp::cast(self.avx512f._mm512_permutexvar_ps(pulp::cast(index), table))
    }

    #[inline(always)]
    fn at_least(self, a: Self::f32s, b: Self::f32s) -> u32 {
        const GREATER_OR_EQUAL: i32 = std::arch::x86_64::_CMP_GE_OQ;
        u32::from(self.avx512f._mm512_cmp_ps_mask::<GREATER_OR_EQUAL>(pulp::cast(a), pulp::cast(b)))
    }
}

#[cfg(target_arch = "x86_64")]
impl Lanes for pulp::x86::V3 {
    const MANY_REGISTERS: bool = false;

    #[inline(always)]
    unsafe fn widen_u16(self, x: *const u16) -> Self::u32s {
        // SAFETY: the caller's promise; the read is unaligned.
        let x = unsafe { x.cast::<__m128i>().read_unaligned() };
        pulp::cast(self.avx2._mm256_cvtepu16_epi32(x))
    }

    #[inline(always)]
    fn lookup(self, table: &[f32; 16], index: Self::u32s) -> Self::f32s {
        let halves = table.as_ptr().cast::<__m256>();
        // SAFETY: the table is two vectors long; the reads are unaligned.
        let (low, high) = unsafe { (halves.read_unaligned(), halves.add(1).read_unaligned()) };
        let low = self.avx2._mm256_permutevar8x32_ps(low, pulp::cast(index));
        let high = self.avx2._mm256_permutevar8x32_ps(high, pulp::cast(index));
        // The blend reads sign bits: bit 3 of the index moves there.
        let pick = self.shift_left(index, 28);
        pulp::cast(self.avx._mm256_blendv_ps(low, high, pulp::cast(pick)))
    }

    #[inline(always)]
    fn at_least(self, a: Self::f32s, b: Self::f32s) -> u32 {
        let mask = self.greater_than_or_equal_f32s(a, b);
        self.avx._mm256_movemask_ps(pulp::cast(mask)) as u32
    }
}

/// Lanes by way of memory, for instruction sets of four lanes: the compiler turns the short loops into vector code.
macro_rules! four_lanes {
    ($simd: ty, $many: expr) => {
        impl Lanes for $simd {
            const MANY_REGISTERS: bool = $many;

            #[inline(always)]
            unsafe fn widen_u16(self, x: *const u16) -> Self::u32s {
                // SAFETY: the caller's promise; the read is unaligned.
                let x = unsafe { x.cast::<[u16; 4]>().read_unaligned() };
                pulp::cast([u32::from(x[0]), u32::from(x[1]), u32::from(x[2]), u32::from(x[3])])
            }

            #[inline(always)]
            fn lookup(self, table: &[f32; 16], index: Self::u32s) -> Self::f32s {
                let index: [u32; 4] = pulp::cast(index);
                pulp::cast(index.map(|i| table[(i & 15) as usize]))
            }

            #[inline(always)]
            fn at_least(self, a: Self::f32s, b: Self::f32s) -> u32 {
                let (a, b): ([f32; 4], [f32; 4]) = (pulp::cast(a), pulp::cast(b));
                (0..4).map(|i| u32::from(a[i] >= b[i]) << i).sum()
            }
        }
    };
}

four_lanes!(pulp::Scalar128b, false);
#[cfg(target_arch = "aarch64")]
four_lanes!(pulp::aarch64::Neon, true);

/// A computation written over any instruction set. `run` and all it calls must be `inline(always)`, or the compiler
/// emits it without the instruction set; closures that compute with vectors cannot be, so kernels have none.
pub(crate) trait Kernel {
    type Output;
    fn run<S: Lanes>(self, simd: S) -> Self::Output;
}

/// An instruction set that was found to be there.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Level {
    #[cfg(target_arch = "x86_64")]
    V4(pulp::x86::V4),
    #[cfg(target_arch = "x86_64")]
    V3(pulp::x86::V3),
    #[cfg(target_arch = "aarch64")]
    Neon(pulp::aarch64::Neon),
    Portable,
}

impl Level {
    /// All that this machine has, best first.
    pub fn available() -> Vec<Self> {
        #[cfg(target_arch = "x86_64")]
        let vectors = [pulp::x86::V4::try_new().map(Self::V4), pulp::x86::V3::try_new().map(Self::V3)];
        #[cfg(target_arch = "aarch64")]
        let vectors = [pulp::aarch64::Neon::try_new().map(Self::Neon)];
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        let vectors = [None];
        vectors.into_iter().flatten().chain([Self::Portable]).collect()
    }

    /// The best one.
    pub fn best() -> Self {
        static BEST: std::sync::OnceLock<Level> = std::sync::OnceLock::new();
        *BEST.get_or_init(|| Self::available()[0])
    }

    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::V4(simd) => Simd::vectorize(simd, Run(simd, kernel)),
            #[cfg(target_arch = "x86_64")]
            Self::V3(simd) => Simd::vectorize(simd, Run(simd, kernel)),
            #[cfg(target_arch = "aarch64")]
            Self::Neon(simd) => Simd::vectorize(simd, Run(simd, kernel)),
            Self::Portable => Simd::vectorize(pulp::Scalar128b, Run(pulp::Scalar128b, kernel)),
        }
    }
}

/// Carries our token past pulp's dispatch, whose own bound is pulp's trait alone.
struct Run<S, K>(S, K);

impl<S: Lanes, K: Kernel> pulp::WithSimd for Run<S, K> {
    type Output = K::Output;

    #[inline(always)]
    fn with_simd<T: Simd>(self, _: T) -> K::Output {
        self.1.run(self.0)
    }
}

/// Asks for the lines of a row that will be read soon.
#[inline(always)]
pub(crate) fn prefetch<E>(row: &[E]) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..size_of_val(row)).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: prefetching reads nothing into the program and faults on no address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(row.as_ptr().cast::<i8>().wrapping_add(line)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = row;
}

/// As [`prefetch`] for the line that holds element `at`, and into the second cache: for streams that are too many, or
/// too regularly spaced, for the first one to hold what was asked for. `at` may lie past the end.
#[inline(always)]
pub(crate) fn prefetch_far<E>(data: &[E], at: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: prefetching reads nothing into the program and faults on no address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(data.as_ptr().wrapping_add(at).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (data, at);
}

/// Element types that kernels read, widening in registers.
pub(crate) trait Element: bytemuck::Pod + Send + Sync + std::fmt::Debug {
    /// Reads one vector from `x` on.
    ///
    /// # Safety
    /// As many elements as there are lanes can be read from `x`.
    unsafe fn load_at<S: Lanes>(simd: S, x: *const Self) -> S::f32s;

    #[inline(always)]
    fn load<S: Lanes>(simd: S, x: &[Self]) -> S::f32s {
        let x = &x[..S::F32_LANES];
        // SAFETY: the slice was cut to as many elements as there are lanes.
        unsafe { Self::load_at(simd, x.as_ptr()) }
    }

    fn to_f32(self) -> f32;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load_at<S: Lanes>(_: S, x: *const Self) -> S::f32s {
        // SAFETY: the caller's promise; the read is unaligned.
        unsafe { x.cast::<S::f32s>().read_unaligned() }
    }

    fn to_f32(self) -> f32 {
        self
    }
}

impl Element for f16 {
    #[inline(always)]
    unsafe fn load_at<S: Lanes>(simd: S, x: *const Self) -> S::f32s {
        // SAFETY: the caller's promise; f16 is a u16 in memory.
        unsafe { simd.widen_f16(x.cast()) }
    }

    fn to_f32(self) -> f32 {
        f16::to_f32(self)
    }
}

impl Element for bf16 {
    #[inline(always)]
    unsafe fn load_at<S: Lanes>(simd: S, x: *const Self) -> S::f32s {
        // SAFETY: the caller's promise; bf16 is a u16 in memory.
        unsafe { simd.widen_bf16(x.cast()) }
    }

    fn to_f32(self) -> f32 {
        bf16::to_f32(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Widen<'a, E>(&'a [E], &'a mut [f32]);

    impl<E: Element> Kernel for Widen<'_, E> {
        type Output = ();
        #[inline(always)]
        fn run<S: Lanes>(self, simd: S) {
            for i in (0..self.0.len()).step_by(S::F32_LANES) {
                simd.store(&mut self.1[i..], E::load(simd, &self.0[i..]));
            }
        }
    }

    /// All finite numbers of both half types, subnormals and zeros of both signs too, bit by bit.
    #[test]
    fn widening_is_exact() {
        for level in Level::available() {
            let halves: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).filter(|x| x.is_finite()).collect();
            let brains: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).filter(|x| x.is_finite()).collect();
            let (halves, brains) = (&halves[..halves.len() / 16 * 16], &brains[..brains.len() / 16 * 16]);
            let mut out = vec![0.0; halves.len()];
            level.run(Widen(halves, &mut out));
            assert!(out.iter().zip(halves).all(|(a, b)| a.to_bits() == b.to_f32().to_bits()), "{level:?} f16");
            let mut out = vec![0.0; brains.len()];
            level.run(Widen(brains, &mut out));
            assert!(out.iter().zip(brains).all(|(a, b)| a.to_bits() == b.to_f32().to_bits()), "{level:?} bf16");
        }
    }

    struct Exp<'a>(&'a mut [f32]);

    impl Kernel for Exp<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Lanes>(self, simd: S) {
            for x in S::as_mut_simd_f32s(self.0).0 {
                *x = simd.exp(*x);
            }
        }
    }

    #[test]
    fn exponential_within_its_bound() {
        for level in Level::available() {
            let x: Vec<f32> = (0..16 * 8000).map(|i| i as f32 * -87.0 / 128_000.0).collect();
            let mut y = x.clone();
            level.run(Exp(&mut y));
            for (x, y) in x.iter().zip(y) {
                let expected = f64::from(*x).exp();
                assert!((f64::from(y) / expected - 1.0).abs() < 2f64.powi(-22), "{level:?} e^{x} = {y}");
            }
            let mut y = [f32::NEG_INFINITY, -87.5, -1e30, 0.0, -0.0, -1e-30].repeat(8);
            level.run(Exp(&mut y));
            assert_eq!(y, [0.0, 0.0, 0.0, 1.0, 1.0, 1.0].repeat(8), "{level:?}");
        }
    }

    struct Transpose<'a>(&'a [f32], &'a mut [f32]);

    impl Kernel for Transpose<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Lanes>(self, simd: S) {
            simd.transpose(self.0, ROW + 3, self.1, ROW + 1);
        }
    }

    #[test]
    fn transposes() {
        for level in Level::available() {
            let x: Vec<f32> = (0..ROW * (ROW + 3)).map(|i| i as f32).collect();
            let mut y = vec![0.0; ROW * (ROW + 1)];
            level.run(Transpose(&x, &mut y));
            for i in 0..ROW {
                for j in 0..ROW {
                    assert_eq!(y[j * (ROW + 1) + i], x[i * (ROW + 3) + j], "{level:?} {i} {j}");
                }
            }
        }
    }

    struct Compare<'a>(&'a [f32], f32);

    impl Kernel for Compare<'_> {
        type Output = u32;
        #[inline(always)]
        fn run<S: Lanes>(self, simd: S) -> u32 {
            let mut bits = 0;
            for i in (0..16).step_by(S::F32_LANES) {
                bits |= simd.at_least(simd.load(&self.0[i..]), simd.splat_f32s(self.1)) << i;
            }
            bits
        }
    }

    #[test]
    fn comparison_bits() {
        let x: Vec<f32> = [0.0, -0.0, 1.0, -1.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e-40].repeat(2);
        for level in Level::available() {
            assert_eq!(level.run(Compare(&x, 0.0)), 0b1010_0111_1010_0111, "{level:?}");
        }
    }
}
