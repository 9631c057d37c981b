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
#ifndef IN_TYPE
#define IN_TYPE 2
#endif
#ifndef TERMS
#define TERMS (IN_TYPE == 0 ? 2 : 1)
#endif
#ifndef OUT_TYPE
#define OUT_TYPE IN_TYPE
#endif
#ifndef GRADIENT_TYPE
#define GRADIENT_TYPE 0
#endif
#ifndef STAGES
#define STAGES 2
#endif
#ifndef BACKWARD_BLOCKS
#define BACKWARD_BLOCKS 1
#endif
#ifndef FORWARD_STAGES
#define FORWARD_STAGES 2
#endif
#ifndef FORWARD_BLOCKS
#define FORWARD_BLOCKS 1
#endif
#ifdef ANY_SHAPE
#include "../../shaders/cuda/race/machine.cuh"
#include "../../shaders/cuda/race/walk.cuh"
#if IN_TYPE == 0
typedef float Element;
#else
typedef u16 Element;
#endif
#if GRADIENT_TYPE == 0
typedef float Gradient;
#else
typedef u16 Gradient;
#endif
#define SUMS_SHARED 0
#define FORWARD_SHARED 0
#define BACKWARD_SHARED 0
#else
#include "../../shaders/cuda/race/sums.cu"
#include "../../shaders/cuda/race/forward.cu"
#include "../../shaders/cuda/race/backward_query.cu"
#include "../../shaders/cuda/race/backward_key.cu"
#endif
#include "../../shaders/cuda/race/scan.cu"
#undef SCAN_NAME
#undef SCAN_REVERSED
#define REVERSED
#define scan scan_again
#define column_sum column_sum_again
#define Scan ScanAgain
#undef SCAN_THREADS
#undef SCAN_COLUMNS
#include "../../shaders/cuda/race/scan.cu"
#undef scan
#undef column_sum
#undef Scan
#include "../../shaders/cuda/race/add_parameters.cu"
