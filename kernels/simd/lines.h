// Memory for vectors: entries that begin with a cache line, for a vector that lies across two lines costs two reads.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace kernels {

template <class T>
class Lines {
public:
    explicit Lines(int64_t size = 0) { resize(size); }
    void resize(int64_t size) { lines_.resize((size + kEntries - 1) / kEntries); } // what is new is zero
    void zero() { std::fill(lines_.begin(), lines_.end(), Line{}); }
    T* data() { return lines_.data()->entries; }
    const T* data() const { return lines_.data()->entries; }

private:
    static constexpr int64_t kEntries = 64 / sizeof(T);
    struct alignas(64) Line {
        T entries[kEntries];
    };
    std::vector<Line> lines_;
};

using Buffer = Lines<float>;
using Halves = Lines<uint16_t>; // bfloat16 as its bits

} // namespace kernels
