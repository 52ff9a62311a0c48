// Compiled once for each instruction set; KERNELS names the table that this copy fills.
#include "attention.h"
#include "pointwise.h"
#include "product.h"

const pagedserve::Kernels pagedserve::KERNELS = {
    LANES, attend_scratch, attend, merge, panel, pack, multiply_some, widen_some, norm, rope, gated,
};
