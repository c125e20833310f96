// Copies from global to shared memory that go on in the background.
#pragma once

#include "common/launch.h"

namespace vim {

#ifdef __CUDA_ARCH__

// Copies BYTES, or fills them with zeros where `inside` is false; then nothing is read.
template <int BYTES>
VIM_DEVICE void copy_async(void* target, const void* source, bool inside) {
    const unsigned place = static_cast<unsigned>(__cvta_generic_to_shared(target));
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(place), "l"(source), "n"(BYTES), "r"(inside ? BYTES : 0)
                 : "memory");
}

// The copies of this thread have arrived.
VIM_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

#else

template <int BYTES>
VIM_DEVICE void copy_async(void* target, const void* source, bool inside) {
    struct alignas(BYTES) Chunk {
        char bytes[BYTES];
    };
    *static_cast<Chunk*>(target) = inside ? *static_cast<const Chunk*>(source) : Chunk{};
}

VIM_DEVICE void wait_for_copies() {}

#endif

}  // namespace vim
