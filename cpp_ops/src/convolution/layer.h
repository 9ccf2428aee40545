// A convolution or matrix product with the weights of one node, on CUDA.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "common/ort.h"
#include "convolution/op.h"

namespace scm {

// Holds the packed weights and the workspace that outlives a run. Several threads may run it at once, on streams of their own.
class ConvolutionLayer {
 public:
  // Packs the input `w` if it is constant. Does nothing during shape inference.
  ConvolutionLayer(const Attributes& attributes, int taps);

  // Checks the shapes of x and w, as far as they are known.
  void check(const Shape& x, const Shape& w) const;
  // Returns the shape of the result.
  Shape output(const Shape& x, const Shape& w) const;

  // Returns the arguments of the kernel, without epilogue. Weights that are not constant are packed now and released with `weight`.
  template <typename T>
  convolution::Params<T> params(const Context& run, const Input& x, const Input& w, Memory& weight) const;
  // Enqueues the kernel.
  template <typename T>
  void run(const Context& run, convolution::Params<T> params) const;

 private:
  struct StreamCounters {
    void* stream;
    Memory memory;
  };

  std::size_t in_axis() const { return taps_ == 9 ? 1 : 0; }  // of w: [out, in, 3, 3] or [in, out]
  std::size_t out_axis() const { return 1 - in_axis(); }
  convolution::Sizes sizes(const Shape& x, const Shape& w) const;
  convolution::Tile tile(const convolution::Sizes& sizes) const;
  std::uint32_t* counters(void* stream) const;

  const int taps_;
  const std::unique_ptr<Allocator> allocator_;
  convolution::Device device_{};
  std::optional<convolution::Tile> forced_;  // in place of the chosen tile
  Memory packed_;
  mutable std::mutex mutex_;  // guards the members below
  mutable std::map<std::array<std::int64_t, 4>, convolution::Tile> tiles_;  // chosen before, by samples, pixels, in and out
  mutable std::vector<StreamCounters> counters_;
};

}  // namespace scm
