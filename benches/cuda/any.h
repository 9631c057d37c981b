// The kernels for any shape, as one piece.
#ifndef RATIO
#define SCALE (1.0f / (TABLES << PLANES))
#else
#define SCALE 1.0f
#endif
#define ENSEMBLES 1
#define GRAD_TYPE IN_TYPE
#define ANY(name) "../../shaders/cuda/race/any/" name
#include "../../shaders/cuda/race/any/any.cuh"
#define PER_HEAD 1
#define W_ROW BUCKETS
#include "../../shaders/cuda/race/any/hash.cu"
#include "../../shaders/cuda/race/any/through_hash.cu"
#include "../../shaders/cuda/race/any/hash_inputs.cu"
#include "../../shaders/cuda/race/any/hash_parameters.cu"
#undef PER_HEAD
#undef W_ROW
#define PER_HEAD GROUP
#define W_ROW (BUCKETS + 1)
#define any_hash any_hash_q
#define any_through_hash any_through_hash_q
#define any_hash_inputs any_hash_inputs_q
#define any_hash_parameters any_hash_parameters_q
#define TABLES_AT_ONCE TABLES_AT_ONCE_Q
#define TABLE_TILES TABLE_TILES_Q
#define BITS_AT_ONCE BITS_AT_ONCE_Q
#define BITS_TILE BITS_TILE_Q
#define ROWS_AT_ONCE ROWS_AT_ONCE_Q
#include "../../shaders/cuda/race/any/hash.cu"
#include "../../shaders/cuda/race/any/through_hash.cu"
#include "../../shaders/cuda/race/any/hash_inputs.cu"
#include "../../shaders/cuda/race/any/hash_parameters.cu"
#undef any_hash
#undef TABLES_AT_ONCE
#undef TABLE_TILES
#undef BITS_AT_ONCE
#undef BITS_TILE
#undef ROWS_AT_ONCE
#undef any_through_hash
#undef any_hash_inputs
#undef any_hash_parameters
#include "../../shaders/cuda/race/any/chunk_sums.cu"
#include "../../shaders/cuda/race/any/group_totals.cu"
#define any_group_prefix any_group_prefix_back
#include "../../shaders/cuda/race/any/group_prefix.cu"
#undef any_group_prefix
#undef REVERSED
#include "../../shaders/cuda/race/any/group_prefix.cu"
#include "../../shaders/cuda/race/any/read_weights.cu"
#include "../../shaders/cuda/race/any/products.cu"
#include "../../shaders/cuda/race/any/output.cu"
#include "../../shaders/cuda/race/any/gains.cu"
#include "../../shaders/cuda/race/any/values.cu"
#include "../../shaders/cuda/race/any/query.cu"
#include "../../shaders/cuda/race/any/query_sums.cu"
#include "../../shaders/cuda/race/any/key.cu"
#include "../../shaders/cuda/race/any/value.cu"
#include "../../shaders/cuda/race/any/step.cu"
#include "../../shaders/cuda/race/any/fold.cu"
#include "../../shaders/cuda/race/any/finish_parameters.cu"
