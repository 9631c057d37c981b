//! Reading buffers back.

use super::*;

#[test]
fn reads_come_back_at_any_offset_and_length() {
    let ctx = context(true);
    let data: Vec<u8> = (0..=250).collect();
    let buffer = ctx.buffer_with(OP, "data", &data, Usage::COPY_SRC).unwrap();
    assert_eq!(buffer.size(), 252);
    for (offset, bytes) in [(0, 251), (1, 1), (3, 2), (4, 4), (7, 90), (250, 1), (251, 1), (9, 0)] {
        let mut padded = data.clone();
        padded.push(0);
        let expected = &padded[offset..offset + bytes];
        let (offset, bytes) = (offset as u64, bytes as u64);
        assert_eq!(ctx.read_buffer_blocking(OP, &buffer, offset, bytes).unwrap(), expected);
        assert_eq!(pollster::block_on(ctx.read_buffer(OP, &buffer, offset, bytes)).unwrap(), expected);
    }
    for (offset, bytes) in [(0, 253), (252, 1), (u64::MAX, 1), (1, u64::MAX)] {
        let error = ctx.read_buffer_blocking(OP, &buffer, offset, bytes).unwrap_err();
        assert!(matches!(error, Error::Limit { limit: 252, .. }), "{error}");
    }
}

#[test]
fn many_reads_at_once_from_many_threads() {
    let ctx = context(true);
    std::thread::scope(|scope| {
        for thread in 0..4u8 {
            let ctx = &ctx;
            scope.spawn(move || {
                for i in 0..25u8 {
                    let data = vec![thread * 50 + i; 1000];
                    let buffer = ctx.buffer_with(OP, "data", &data, Usage::COPY_SRC).unwrap();
                    let read = if i % 2 == 0 {
                        ctx.read_buffer_blocking(OP, &buffer, 0, 1000)
                    } else {
                        pollster::block_on(ctx.read_buffer(OP, &buffer, 0, 1000))
                    };
                    assert_eq!(read.unwrap(), data);
                }
            });
        }
    });
}

#[test]
fn a_read_can_move_between_threads() {
    fn sendable<T: Send>(value: T) -> T {
        value
    }
    let ctx = context(true);
    let buffer = ctx.buffer_with(OP, "data", &[1, 2, 3, 4], Usage::COPY_SRC).unwrap();
    let read = sendable(ctx.read_buffer(OP, &buffer, 0, 4));
    assert_eq!(pollster::block_on(read).unwrap(), [1, 2, 3, 4]);
}
