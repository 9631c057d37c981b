// An invocation's place in its workgroup. WGSL does not say which invocations form a subgroup; where subgroups are used
// they count their own, so that neighbours by `local_of` are neighbours there.
struct Place {
    @builtin(workgroup_id) group: vec3<u32>,
#ifdef SUBGROUPS
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_size) subgroup_size: u32,
    @builtin(subgroup_invocation_id) in_subgroup: u32,
#else
    @builtin(local_invocation_index) local: u32,
#endif
}

fn local_of(place: Place) -> u32 {
#ifdef SUBGROUPS
    return place.subgroup * place.subgroup_size + place.in_subgroup;
#else
    return place.local;
#endif
}
