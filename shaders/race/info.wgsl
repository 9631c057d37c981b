// What a piece says of its sequences: first the tokens of each, then what the kernels' parameters define.
@group(0) @binding(1) var<storage, read> info: array<u32>;
// The first input stands next; where a second one does is the kernel's.
const INPUT: u32 = 2u;

fn length_of(b: u32) -> u32 {
    return info[b];
}

// Grids fold past 65,535 workgroups: x is `group_width` wide, and the last row may hold idle groups.
fn group_index(group: vec3<u32>) -> u32 {
    return group.y * p.group_width + group.x;
}
