// The products over four lanes that every processor has.
#include "../simd/lanes_portable.h"
#include "row_simd.h"

namespace kernels::nm {

const RowOps& portable_row_ops() {
    static const RowOps ops = simd_row_ops<simd::Portable>("portable");
    return ops;
}

} // namespace kernels::nm
