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
#include "../../shaders/cuda/race/any/project.cu"
#include "../../shaders/cuda/race/any/weights.cu"
#include "../../shaders/cuda/race/any/through_hash.cu"
#include "../../shaders/cuda/race/any/hash_inputs.cu"
#include "../../shaders/cuda/race/any/hash_parameters.cu"
#undef PER_HEAD
#undef W_ROW
#define PER_HEAD GROUP
#define W_ROW (BUCKETS + 1)
#define any_project any_project_q
#define any_weights any_weights_q
#define any_through_hash any_through_hash_q
#define any_hash_inputs any_hash_inputs_q
#define any_hash_parameters any_hash_parameters_q
#include "../../shaders/cuda/race/any/project.cu"
#include "../../shaders/cuda/race/any/weights.cu"
#include "../../shaders/cuda/race/any/through_hash.cu"
#include "../../shaders/cuda/race/any/hash_inputs.cu"
#include "../../shaders/cuda/race/any/hash_parameters.cu"
#undef any_project
#undef any_weights
#undef any_through_hash
#undef any_hash_inputs
#undef any_hash_parameters
#include "../../shaders/cuda/race/any/chunk_sums.cu"
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
