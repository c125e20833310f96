// Element types by the code that the Python side passes (runtime/tensors.py).
#pragma once

namespace vim {

enum DataType { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

}  // namespace vim
