// Graphs: lists of nodes, which a launch goes through in the order in which they were added.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "log.h"

struct CUfunc_st;

namespace stub {

enum class Kind { kernel, copy, fill, host, empty, child, event };

struct KernelNode {
  CUfunc_st* function;
  unsigned grid[3], block[3], shared;
};
struct CopyNode {
  void* to;
  const void* from;
  size_t width, height, to_pitch, from_pitch;  // bytes
  std::vector<char> source;                    // contents at the capture, if the source is not on a device
};
struct Record {  // of an event. Graphs that record the event outlive it
  bool done;
  double time;  // milliseconds
};
struct FillNode {
  void* to;
  unsigned value;
  size_t element, width, height, pitch;  // bytes, but the width in elements
};

}  // namespace stub

// The driver's opaque types.
struct CUgraphNode_st {
  stub::Kind kind;
  stub::KernelNode kernel{};
  stub::CopyNode copy{};
  stub::FillNode fill{};
  std::shared_ptr<stub::Record> record = nullptr;
  CUhostFn host_function = nullptr;
  void* host_data = nullptr;
  struct CUgraph_st* child = nullptr;
  std::vector<CUgraphNode_st*> dependencies{};
};
struct CUgraph_st {
  std::vector<std::shared_ptr<CUgraphNode_st>> nodes;
};
struct CUgraphExec_st {
  std::vector<std::shared_ptr<CUgraphNode_st>> nodes;
  int id;
  int launches = 0;
};

namespace stub {

CUgraphNode_st* add_node(CUgraph_st* graph, CUgraphNode_st node);

// The work itself, now or when a graph is launched.
void log_kernel(const char* state, int stream, const KernelNode& kernel);
void do_copy(const CopyNode& copy);
void do_fill(const FillNode& fill);

}  // namespace stub
