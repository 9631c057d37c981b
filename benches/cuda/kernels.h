// All kernels of RACE for one configuration, given by macros.
#ifndef HEAD_DIM
#define HEAD_DIM 128
#define VALUE_DIM 128
#endif
#ifndef PLANES
#define PLANES 4
#define TABLES 4
#endif
#ifndef GROUP
#define GROUP 1
#endif
#ifndef TERMS
#define TERMS 1
#endif
#ifndef IN_TYPE
#define IN_TYPE 2
#endif
#ifndef OUT_TYPE
#define OUT_TYPE IN_TYPE
#endif
#ifndef GRADIENT_TYPE
#define GRADIENT_TYPE 0
#endif
#ifndef FORWARD_BLOCKS
#define FORWARD_BLOCKS 1
#endif
#include "../../shaders/cuda/race/sums.cu"
#include "../../shaders/cuda/race/forward.cu"
#include "../../shaders/cuda/race/backward_query.cu"
#include "../../shaders/cuda/race/backward_key.cu"
#include "../../shaders/cuda/race/scan.cu"
#include "../../shaders/cuda/race/add_parameters.cu"
