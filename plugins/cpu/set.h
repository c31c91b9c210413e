// All kernels, for one instruction set: included once for each, within its own namespace.

#include "vectors.h"
#include "panel_products.h"
#include "plain_products.h"
#include "turned_products.h"
#include "fp8_products.h"
#include "stacked_products.h"
#include "caches.h"
#include "transpose.h"
#include "attention_products.h"
#include "attention.h"

constexpr Kernels KERNELS = {VALUE_SIZE,       FEW,         TALL,     turned_inputs,  quantise,   multiply,
                             turn_rows,        lay_rows,    multiply_plain, multiply_stacked, sum_stretch,
                             activate,         round_fp8,   {},       enter,          attend_span, join_span,
                             finish};
