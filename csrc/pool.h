// PyTorch's threads, as the kernels take them.
#pragma once

#include "cpu/loss.h"

namespace cmim {

cpu::Pool torch_pool();

}  // namespace cmim
