#include "graphs.h"

#include <atomic>
#include <cstring>
#include <utility>

#include "memory.h"
#include "modules.h"
#include "streams.h"

namespace stub {
namespace {

std::atomic<int> next_graph{1};

// A source outside the device must hold at each launch what the graph's owner means to copy. Memory that is reused holds something else by then.
void check_source(const CopyNode& copy) {
  if (copy.source.empty() || !is_valid(copy.from, copy.width) || std::memcmp(copy.source.data(), copy.from, copy.width) == 0) return;
  say("STALE", "a replayed copy of %zu bytes reads memory of the host at %p, whose contents have changed since the capture", copy.width, copy.from);
}

void replay(const std::vector<std::shared_ptr<CUgraphNode_st>>& nodes, int stream) {
  for (const auto& node : nodes) {
    switch (node->kind) {
      case Kind::kernel: log_kernel("replayed", stream, node->kernel); break;
      case Kind::copy: {
        const CopyNode& copy = node->copy;
        say("copy", "replayed\t%d\t%c%c\t%zu\tasync", stream, memory_letter(copy.from), memory_letter(copy.to), copy.width * copy.height);
        check_source(copy);
        if (is_valid(copy.to, copy.width) && is_valid(copy.from, copy.width)) do_copy(copy);
        break;
      }
      case Kind::fill:
        say("fill", "replayed\t%d\t%zu\tasync", stream, node->fill.width * node->fill.height * node->fill.element);
        if (is_valid(node->fill.to, node->fill.width * node->fill.element)) do_fill(node->fill);
        break;
      case Kind::host: node->host_function(node->host_data); break;
      case Kind::child: replay(node->child->nodes, stream); break;
      case Kind::event: *node->record = {true, milliseconds()}; break;
      case Kind::empty: break;
    }
  }
}

}  // namespace

CUgraphNode_st* add_node(CUgraph_st* graph, CUgraphNode_st node) {
  graph->nodes.push_back(std::make_shared<CUgraphNode_st>(std::move(node)));
  return graph->nodes.back().get();
}

}  // namespace stub

STUB_API(cuGraphCreate)(CUgraph* graph, unsigned) {
  *graph = new CUgraph_st;
  return CUDA_SUCCESS;
}
STUB_API(cuGraphDestroy)(CUgraph graph) {  // instances keep the nodes
  delete graph;
  return CUDA_SUCCESS;
}
STUB_API(cuGraphGetNodes)(CUgraph graph, CUgraphNode* nodes, size_t* count) {
  const size_t all = graph->nodes.size();
  if (nodes != nullptr) {
    for (size_t i = 0; i < *count; ++i) nodes[i] = i < all ? graph->nodes[i].get() : nullptr;
  }
  if (nodes == nullptr || *count > all) *count = all;
  return CUDA_SUCCESS;
}
STUB_API(cuGraphNodeGetType)(CUgraphNode node, CUgraphNodeType* type) {
  switch (node->kind) {
    case stub::Kind::kernel: *type = CU_GRAPH_NODE_TYPE_KERNEL; break;
    case stub::Kind::copy: *type = CU_GRAPH_NODE_TYPE_MEMCPY; break;
    case stub::Kind::fill: *type = CU_GRAPH_NODE_TYPE_MEMSET; break;
    case stub::Kind::host: *type = CU_GRAPH_NODE_TYPE_HOST; break;
    case stub::Kind::empty: *type = CU_GRAPH_NODE_TYPE_EMPTY; break;
    case stub::Kind::child: *type = CU_GRAPH_NODE_TYPE_GRAPH; break;
    case stub::Kind::event: *type = CU_GRAPH_NODE_TYPE_EVENT_RECORD; break;
  }
  return CUDA_SUCCESS;
}
STUB_API(cuGraphAddEmptyNode)(CUgraphNode* node, CUgraph graph, const CUgraphNode* dependencies, size_t count) {
  *node = stub::add_node(graph, {stub::Kind::empty});
  (*node)->dependencies.assign(dependencies, dependencies + count);
  return CUDA_SUCCESS;
}
STUB_API(cuGraphAddChildGraphNode)(CUgraphNode* node, CUgraph graph, const CUgraphNode* dependencies, size_t count, CUgraph child) {
  *node = stub::add_node(graph, {stub::Kind::child});
  (*node)->dependencies.assign(dependencies, dependencies + count);
  (*node)->child = new CUgraph_st(*child);
  return CUDA_SUCCESS;
}
STUB_API(cuGraphInstantiateWithFlags)(CUgraphExec* instance, CUgraph graph, unsigned long long) {
  STUB_FAIL_IF_ORDERED();
  *instance = new CUgraphExec_st{graph->nodes, stub::next_graph++};
  stub::say("instantiate", "graph %d nodes %zu", (*instance)->id, graph->nodes.size());
  return CUDA_SUCCESS;
}
STUB_API(cuGraphInstantiateWithParams)(CUgraphExec* instance, CUgraph graph, CUDA_GRAPH_INSTANTIATE_PARAMS* parameters) {
  parameters->result_out = CUDA_GRAPH_INSTANTIATE_SUCCESS;
  return cuGraphInstantiateWithFlags(instance, graph, parameters->flags);
}
STUB_API(cuGraphUpload)(CUgraphExec, CUstream) { return CUDA_SUCCESS; }
STUB_API(cuGraphExecDestroy)(CUgraphExec instance) {
  stub::say("destroy", "graph %d after %d launches", instance->id, instance->launches);
  delete instance;
  return CUDA_SUCCESS;
}
STUB_API(cuGraphLaunch)(CUgraphExec instance, CUstream handle) {
  STUB_FAIL_IF_ORDERED();
  CUstream_st* stream = stub::stream_of(handle);
  if (const CUresult error = stub::forbidden_on_legacy_stream(stream, __func__)) return error;
  ++instance->launches;
  if (stream->capture != nullptr) {  // the graph becomes a part of the captured one
    CUgraphNode_st child{stub::Kind::child};
    child.child = new CUgraph_st{instance->nodes};
    stub::capture_node(stream, child);
    return CUDA_SUCCESS;
  }
  stub::say("graph", "launch %d of graph %d nodes %zu on stream %d", instance->launches, instance->id, instance->nodes.size(), stream->id);
  stub::replay(instance->nodes, stream->id);
  return CUDA_SUCCESS;
}
