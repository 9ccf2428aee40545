// Streams and events, the captures of streams into graphs, and what a capture forbids.
#pragma once

#include <sys/types.h>

#include <memory>
#include <vector>

#include "graphs.h"
#include "log.h"

struct CUstream_st;

namespace stub {

struct Capture {
  CUgraph_st* graph;
  CUstream_st* origin;
  CUstreamCaptureMode mode;
  pid_t thread;
  unsigned long long id;
  bool invalidated = false;
  bool ended = false;
};
using Nodes = std::vector<CUgraphNode_st*>;

}  // namespace stub

struct CUstream_st {
  int id;
  unsigned flags;
  int priority;
  int device;
  std::shared_ptr<stub::Capture> capture;  // or none
  stub::Nodes last;                        // what the next node of the capture depends on
};
struct CUevent_st {
  unsigned flags;
  std::shared_ptr<stub::Record> record;
  std::shared_ptr<stub::Capture> capture;  // that it was recorded in
  stub::Nodes last;
};

namespace stub {

// The stream of a handle: handles 0, 1 and 2 are the default streams, of which each device has its own.
CUstream_st* stream_of(CUstream handle);
// "captured" or "now", for the log.
const char* state_of(const CUstream_st* stream);
// Append a node to the stream's capture.
CUgraphNode_st* capture_node(CUstream_st* stream, CUgraphNode_st node);

// For a call that a capture forbids, an allocation or a synchronization for example. A capture in global mode forbids it to all threads, one in thread-local
// mode to its own. Invalidates the capture and returns its error; success if nothing forbids the call.
CUresult forbidden_by_capture(const char* function);
// For work on a stream. The legacy default stream would wait for the other streams, so no work goes there while a blocking stream captures.
CUresult forbidden_on_legacy_stream(const CUstream_st* stream, const char* function);
// For a wait for a stream that captures itself.
CUresult forbidden_while_capturing(CUstream_st* stream, const char* function);
// For a wait for an event that was recorded in a capture.
CUresult forbidden_for_captured_event(CUevent_st* event, const char* function);

}  // namespace stub

#define STUB_FAIL_IF_FORBIDDEN()                                                          \
  do {                                                                                    \
    if (const CUresult forbidden = stub::forbidden_by_capture(__func__)) return forbidden; \
  } while (0)
