#include "cuda/session/device_arena.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "cuda/graph_builder.h"
#include "cuda/session/phases.h"
#include "cuda/session/step_ends.h"

namespace continual_transformers {
namespace {

// cudaMalloc's own alignment.
constexpr int64_t kAlignment = 256;
// A program steps few different numbers of streams at a time. Each has two graphs, if there are
// calls of one step and of several. A graph takes some memory, and making it takes far longer than
// replaying it.
constexpr size_t kMostGraphs = 2 * 16;

int64_t Align(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

DeviceArena::Layout::Layout(const Plan& plan, const DevicePlan& compiled, int64_t streams)
    : streams(streams), values(compiled.row_bytes.size(), -1) {
  int64_t end = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t begin = end;
    end += Align(bytes);
    return begin;
  };
  blocks = take(streams * static_cast<int64_t>(sizeof(char*)));
  positions = take(streams * static_cast<int64_t>(sizeof(int64_t)));
  key_mask = take(streams);
  arrays = take(sizeof(MailedArrays));
  for (const Port& input : plan.inputs) {
    if (values[input.value] < 0) {
      values[input.value] = take(streams * compiled.row_bytes[input.value]);
    }
  }
  sent = end;
  for (size_t i = 0; i < values.size(); ++i) {
    if (values[i] < 0 && compiled.row_bytes[i] > 0) {
      values[i] = take(streams * compiled.row_bytes[i]);
    }
  }
  for (const auto& scratch : compiled.scratch_bytes) values.push_back(take(scratch(streams)));
  bytes = end;
}

DeviceArena::DeviceArena(const Plan& plan, const DevicePlan& compiled,
                         std::shared_ptr<const Gpu> gpu)
    : plan_(plan), compiled_(compiled), gpu_(std::move(gpu)), stream_(gpu_) {}

DeviceArena::~DeviceArena() { DropGraphs(); }

int64_t DeviceArena::bytes() const {
  return step_.bytes() + arrivals_.bytes() + phases_.bytes() + mailbox_.bytes() + staged_.bytes() +
         sent_.bytes() + received_.bytes();
}

int64_t DeviceArena::InputBytes(size_t i) const {
  return compiled_.row_bytes[plan_.inputs[i].value];
}

int64_t DeviceArena::OutputBytes(size_t i) const {
  return compiled_.row_bytes[compiled_.storage[plan_.outputs[i].value]];
}

void DeviceArena::Reserve(GpuBytes* memory, GpuBytes::Kind kind, int64_t bytes) {
  if (memory->bytes() >= bytes) return;
  *memory = GpuBytes();  // first: there may be no room for both
  *memory = GpuBytes(gpu_, kind, bytes, "a step");
}

void DeviceArena::DropGraphs() {
  gpu_->Free([this] {
    for (Graph& graph : graphs_) static_cast<void>(cudaGraphExecDestroy(graph.exec));
  });
  graphs_.clear();
}

DeviceFrame DeviceArena::FrameOf(const Graph& graph, bool overlap) const {
  char* const base = step_.get();
  return {graph.layout.streams,
          reinterpret_cast<char* const*>(base + graph.layout.blocks),
          reinterpret_cast<const int64_t*>(base + graph.layout.positions),
          reinterpret_cast<const bool*>(base + graph.layout.key_mask),
          reinterpret_cast<uint32_t*>(arrivals_.get()),
          graph.values.data(),
          overlap};
}

// Every launch leaves zeros, unless the GPU has failed for good. So nothing clears them again.
void DeviceArena::MakeArrivals() {
  const int64_t bytes = compiled_.arrivals * static_cast<int64_t>(sizeof(uint32_t));
  if (arrivals_.bytes() == bytes) return;
  GpuBytes made(gpu_, GpuBytes::Kind::kDevice, bytes, "a step");
  Check(cudaMemsetAsync(made.get(), 0, static_cast<size_t>(bytes), stream_.get()),
        "clearing counters");
  arrivals_ = std::move(made);
}

DeviceArena::Graph* DeviceArena::GraphFor(int64_t streams, bool mail) {
  for (auto i = graphs_.begin(); i != graphs_.end(); ++i) {
    if (i->layout.streams != streams || i->takes_mailbox != (mail && i->fits_mailbox)) continue;
    graphs_.splice(graphs_.begin(), graphs_, i);
    return &graphs_.front();
  }
  MakeArrivals();
  Graph graph = NewGraph(streams, mail);
  if (graph.takes_mailbox && mailbox_.bytes() == 0) mailbox_ = Mailbox(gpu_);
  if (step_.bytes() < graph.layout.bytes) {
    DropGraphs();  // they hold addresses in this memory
    Reserve(&step_, GpuBytes::Kind::kDevice, graph.layout.bytes);
  }
  for (int64_t offset : graph.layout.values) {
    graph.values.push_back(offset < 0 ? nullptr : step_.get() + offset);
  }
  Build(&graph);
  if (graphs_.size() == kMostGraphs) {
    static_cast<void>(cudaGraphExecDestroy(graphs_.back().exec));
    graphs_.pop_back();
  }
  graphs_.push_front(std::move(graph));
  return &graphs_.front();
}

DeviceArena::Graph DeviceArena::NewGraph(int64_t streams, bool mail) const {
  Graph graph = {Layout(plan_, compiled_, streams), {}, {}, false, false, {}};
  for (size_t i = 0; i < plan_.inputs.size(); ++i) {
    graph.inputs.push_back({graph.layout.values[plan_.inputs[i].value], streams * InputBytes(i)});
  }
  std::vector<int64_t> sizes;
  for (size_t i = 0; i < plan_.outputs.size(); ++i) sizes.push_back(streams * OutputBytes(i));
  graph.outputs = MailedPortsOf(sizes);
  graph.fits_mailbox = Mailbox::Fits(graph.layout.sent, graph.inputs, graph.outputs);
  graph.takes_mailbox = mail && graph.fits_mailbox;
  return graph;
}

TakeInputsEach DeviceArena::InputsOf(const Graph& graph) const {
  TakeInputsEach inputs = {};
  inputs.from = mailbox_.inputs();
  inputs.to = step_.get();
  inputs.size = graph.layout.sent;
  inputs.arrays = reinterpret_cast<const MailedArrays*>(mailbox_.inputs() + graph.layout.arrays);
  inputs.num_ports = static_cast<int>(graph.inputs.size());
  std::copy(graph.inputs.begin(), graph.inputs.end(), inputs.ports);
  return inputs;
}

DeliverOutputsEach DeviceArena::OutputsOf(const Graph& graph) const {
  DeliverOutputsEach outputs = {};
  outputs.to = mailbox_.outputs();
  outputs.size = MailedBytes(graph.outputs);
  outputs.arrays = reinterpret_cast<const MailedArrays*>(step_.get() + graph.layout.arrays);
  outputs.num_ports = static_cast<int>(graph.outputs.size());
  outputs.positions = reinterpret_cast<int64_t*>(step_.get() + graph.layout.positions);
  outputs.streams = graph.layout.streams;
  std::copy(graph.outputs.begin(), graph.outputs.end(), outputs.ports);
  for (size_t i = 0; i < plan_.outputs.size(); ++i) {
    outputs.values[i] = graph.values[compiled_.storage[plan_.outputs[i].value]];
  }
  return outputs;
}

cudaError_t DeviceArena::LaunchAll(const Graph& graph, const DeviceFrame& frame,
                                   Phases* phases) const {
  const cudaStream_t stream = stream_.get();
  const auto launch = [&](const NodeKernels& kernels) {
    if (phases == nullptr) return kernels.launch(frame, stream);
    if (kernels.phase != nullptr) {
      kernels.phase(frame, phases);
      return cudaSuccess;
    }
    const cudaError_t error = phases->Launch(stream);
    return error == cudaSuccess ? kernels.launch(frame, stream) : error;
  };
  cudaError_t error = graph.takes_mailbox ? launch(TakeInputs(InputsOf(graph))) : cudaSuccess;
  for (const DevicePlan::Entry& entry : compiled_.entries) {
    if (error != cudaSuccess) return error;
    error = launch(entry.kernels);
  }
  if (error != cudaSuccess) return error;
  error = launch(graph.takes_mailbox ? DeliverOutputs(OutputsOf(graph)) : AdvancePositions());
  return error == cudaSuccess && phases != nullptr ? phases->Launch(stream) : error;
}

int64_t DeviceArena::PhasesBytes() const {
  return Phases::BytesOf(compiled_.entries.size() + 2);  // and the two ends
}

void DeviceArena::Build(Graph* graph) {
  const bool overlap = may_overlap && CanOverlapSteps();
  const bool persist = may_persist && CanOverlapSteps() && graph->layout.streams == 1;
  if (persist) Reserve(&phases_, GpuBytes::Kind::kDevice, 2 * PhasesBytes());
  cudaError_t error = Instantiate(graph, overlap, persist);
  // The driver may be too old for kernels that persist, or for launches that overlap in a graph.
  if (error != cudaSuccess && persist) {
    static_cast<void>(cudaGetLastError());
    error = Instantiate(graph, overlap, false);
  }
  if (error != cudaSuccess && overlap) {
    static_cast<void>(cudaGetLastError());
    error = Instantiate(graph, false, false);
  }
  Check(error, "making a step's graph");
}

cudaError_t DeviceArena::Instantiate(Graph* graph, bool overlap, bool persist) const {
  cudaGraph_t nodes = nullptr;
  cudaError_t error = cudaGraphCreate(&nodes, 0);
  if (error != cudaSuccess) return error;
  const std::unique_ptr<CUgraph_st, cudaError_t (*)(cudaGraph_t)> owner(nodes, cudaGraphDestroy);
  // A graph that takes the mailbox has the second half.
  char* const phases_at =
      persist && graph->takes_mailbox ? phases_.get() + PhasesBytes() : phases_.get();
  Phases phases(phases_at, persist ? PhasesBytes() : 0, compiled_.cache_dtype,
                gpu_->multiprocessors());
  {
    GraphBuilder builder(nodes);
    error = LaunchAll(*graph, FrameOf(*graph, overlap), persist ? &phases : nullptr);
  }
  if (error == cudaSuccess) error = cudaGraphInstantiate(&graph->exec, nodes, 0);
  if (error == cudaSuccess && phases.launched()) ++persistent_graphs;
  return error;
}

void DeviceArena::TakeStep(const Graph& graph) {
  if (profiles_) {
    TakeProfiledStep(graph);
  } else {
    Check(cudaGraphLaunch(graph.exec, stream_.get()), "launching a step");
  }
}

void DeviceArena::TakeProfiledStep(const Graph& graph) {
  const DeviceFrame frame = FrameOf(graph, false);
  std::vector<cudaEvent_t> events(compiled_.entries.size() + 1);
  for (cudaEvent_t& event : events) Check(cudaEventCreate(&event), "making an event");
  Check(cudaEventRecord(events[0], stream_.get()), "recording an event");
  for (size_t i = 0; i < compiled_.entries.size(); ++i) {
    Check(compiled_.entries[i].kernels.launch(frame, stream_.get()), "launching a node");
    Check(cudaEventRecord(events[i + 1], stream_.get()), "recording an event");
  }
  Check(AdvancePositions().launch(frame, stream_.get()), "advancing positions");
  Check(cudaStreamSynchronize(stream_.get()), "taking a step");
  for (size_t i = 0; i < compiled_.entries.size(); ++i) {
    float milliseconds;
    Check(cudaEventElapsedTime(&milliseconds, events[i], events[i + 1]), "reading an event");
    seconds_[i] += static_cast<double>(milliseconds) / 1e3;
  }
  for (cudaEvent_t event : events) static_cast<void>(cudaEventDestroy(event));
}

void DeviceArena::FillHeader(const StepCall& call, const Layout& layout, char* to) const {
  std::memcpy(to + layout.blocks, call.blocks, call.streams * sizeof(char*));
  std::memcpy(to + layout.positions, call.positions, call.streams * sizeof(int64_t));
  if (call.steps > 1) return;  // Each step has its own mask.
  if (call.key_mask == nullptr) {
    std::memset(to + layout.key_mask, 1, call.streams);
  } else {
    std::memcpy(to + layout.key_mask, call.key_mask, call.streams);
  }
}

void DeviceArena::LookAtArrays(const StepCall& call) {
  bool any = false;
  const auto look = [&](const void* data) {
    const bool on_gpu = data != nullptr && IsOnGpu(data, gpu_->number());
    any |= on_gpu;
    return on_gpu;
  };
  input_on_gpu_.clear();
  output_on_gpu_.clear();
  for (size_t i = 0; i < plan_.inputs.size(); ++i) input_on_gpu_.push_back(look(call.inputs[i]));
  for (size_t i = 0; i < plan_.outputs.size(); ++i) output_on_gpu_.push_back(look(call.outputs[i]));
  // The caller may have put its work on the default stream, and not waited for it.
  if (any) stream_.WaitForDefaultStream();
}

void DeviceArena::Step(const StepCall& call) {
  if (call.streams == 0 || call.steps == 0) return;
  LookAtArrays(call);
  const Graph* const graph = GraphFor(call.streams, call.steps == 1 && !profiles_);
  try {
    if (graph->takes_mailbox) {
      StepByMail(call, *graph);
    } else if (call.steps == 1) {
      StepOnce(call, *graph);
    } else {
      StepSeveral(call, *graph);
    }
  } catch (...) {
    // Other calls may take the streams as soon as this one has ended, so nothing of it may run on.
    static_cast<void>(cudaStreamSynchronize(stream_.get()));
    static_cast<void>(cudaGetLastError());
    throw;
  }
}

// One launch: see mailbox.h.
void DeviceArena::StepByMail(const StepCall& call, const Graph& graph) {
  FillHeader(call, graph.layout, mailbox_.inputs());
  MailedArrays arrays = {};
  for (size_t i = 0; i < plan_.inputs.size(); ++i) {
    const char* const input = static_cast<const char*>(call.inputs[i]);
    if (input_on_gpu_[i]) {
      arrays.inputs[i] = input;
    } else {
      std::memcpy(mailbox_.inputs() + graph.inputs[i].at, input, graph.inputs[i].size);
    }
  }
  for (size_t i = 0; i < plan_.outputs.size(); ++i) {
    char* const output = static_cast<char*>(call.outputs[i]);
    if (output == nullptr) arrays.outputs[i] = UnwantedOutput();
    if (output_on_gpu_[i]) arrays.outputs[i] = output;
  }
  std::memcpy(mailbox_.inputs() + graph.layout.arrays, &arrays, sizeof(arrays));
  TakeStep(graph);
  Check(cudaStreamSynchronize(stream_.get()), "taking a step");
  for (size_t i = 0; i < plan_.outputs.size(); ++i) {
    if (call.outputs[i] == nullptr || output_on_gpu_[i]) continue;
    std::memcpy(call.outputs[i], mailbox_.outputs() + graph.outputs[i].at, graph.outputs[i].size);
  }
}

// One copy to the GPU, the graph, and a copy back for each output. Arrays that are on the GPU take
// no part in that: each has a copy there.
void DeviceArena::StepOnce(const StepCall& call, const Graph& graph) {
  const Layout& layout = graph.layout;
  const cudaStream_t stream = stream_.get();
  int64_t out_bytes = 0;
  for (size_t i = 0; i < plan_.outputs.size(); ++i) out_bytes += call.streams * OutputBytes(i);
  Reserve(&sent_, GpuBytes::Kind::kPinnedHost, layout.sent);
  Reserve(&received_, GpuBytes::Kind::kPinnedHost, out_bytes);
  FillHeader(call, layout, sent_.get());
  int64_t sent = layout.key_mask + call.streams;
  for (size_t i = 0; i < plan_.inputs.size(); ++i) {
    if (input_on_gpu_[i]) continue;
    const int64_t at = layout.values[plan_.inputs[i].value];
    std::memcpy(sent_.get() + at, call.inputs[i], call.streams * InputBytes(i));
    sent = std::max(sent, at + call.streams * InputBytes(i));
  }
  Check(cudaMemcpyAsync(step_.get(), sent_.get(), sent, cudaMemcpyHostToDevice, stream),
        "copying inputs");
  for (size_t i = 0; i < plan_.inputs.size(); ++i) {
    if (!input_on_gpu_[i]) continue;
    Check(cudaMemcpyAsync(graph.values[plan_.inputs[i].value], call.inputs[i],
                          call.streams * InputBytes(i), cudaMemcpyDeviceToDevice, stream),
          "copying inputs");
  }
  TakeStep(graph);
  const auto each_output = [&](const auto& f) {
    char* at = received_.get();
    for (size_t i = 0; i < plan_.outputs.size(); ++i) {
      const int64_t bytes = call.streams * OutputBytes(i);
      if (call.outputs[i] != nullptr) f(i, bytes, at);
      at += bytes;
    }
  };
  each_output([&](size_t i, int64_t bytes, char* at) {
    const char* const from = graph.values[compiled_.storage[plan_.outputs[i].value]];
    void* const to = output_on_gpu_[i] ? call.outputs[i] : at;
    Check(cudaMemcpyAsync(to, from, bytes,
                          output_on_gpu_[i] ? cudaMemcpyDeviceToDevice : cudaMemcpyDeviceToHost,
                          stream),
          "copying outputs");
  });
  Check(cudaStreamSynchronize(stream), "taking a step");
  each_output([&](size_t i, int64_t bytes, const char* at) {
    if (!output_on_gpu_[i]) std::memcpy(call.outputs[i], at, bytes);
  });
}

// The inputs of all steps are copied to the GPU at once, and the outputs back. There, each step
// takes its rows from [M, T, ...] and puts them there. Arrays that are on the GPU are used in
// place.
void DeviceArena::StepSeveral(const StepCall& call, const Graph& graph) {
  const Layout& layout = graph.layout;
  const cudaStream_t stream = stream_.get();
  const int64_t rows = call.streams * call.steps;
  // In `staged_`: inputs, key mask, outputs.
  std::vector<int64_t> inputs, outputs;
  int64_t end = 0;
  const auto take = [&](int64_t bytes) {
    const int64_t begin = end;
    end += Align(bytes);
    return begin;
  };
  for (size_t i = 0; i < plan_.inputs.size(); ++i) {
    inputs.push_back(input_on_gpu_[i] ? -1 : take(rows * InputBytes(i)));
  }
  const int64_t key_mask = take(rows), sent = end;
  for (size_t i = 0; i < plan_.outputs.size(); ++i) {
    const bool staged = call.outputs[i] != nullptr && !output_on_gpu_[i];
    outputs.push_back(staged ? take(rows * OutputBytes(i)) : -1);
  }
  // The header of a single step follows in `sent_`.
  Reserve(&staged_, GpuBytes::Kind::kDevice, end);
  Reserve(&sent_, GpuBytes::Kind::kPinnedHost, sent + layout.key_mask);
  Reserve(&received_, GpuBytes::Kind::kPinnedHost, end - sent);
  for (size_t i = 0; i < plan_.inputs.size(); ++i) {
    if (inputs[i] < 0) continue;
    std::memcpy(sent_.get() + inputs[i], call.inputs[i], rows * InputBytes(i));
  }
  if (call.key_mask == nullptr) {
    std::memset(sent_.get() + key_mask, 1, rows);
  } else {
    std::memcpy(sent_.get() + key_mask, call.key_mask, rows);
  }
  FillHeader(call, layout, sent_.get() + sent);
  Check(cudaMemcpyAsync(staged_.get(), sent_.get(), sent, cudaMemcpyHostToDevice, stream),
        "copying inputs");
  Check(cudaMemcpyAsync(step_.get(), sent_.get() + sent, layout.key_mask, cudaMemcpyHostToDevice,
                        stream),
        "copying inputs");
  for (int64_t t = 0; t < call.steps; ++t) {
    // Row m of a step is row m * T + t of the call.
    const auto move = [&](char* to, int64_t to_pitch, const char* from, int64_t from_pitch,
                          int64_t bytes) {
      // A larger pitch is an error (cudaDevAttrMaxPitch).
      constexpr int64_t kMostPitch = std::numeric_limits<int32_t>::max();
      if (call.streams == 1 || std::max(to_pitch, from_pitch) > kMostPitch) {
        for (int64_t m = 0; m < call.streams; ++m) {
          Check(cudaMemcpyAsync(to + m * to_pitch, from + m * from_pitch, bytes,
                                cudaMemcpyDeviceToDevice, stream),
                "moving the rows of a step");
        }
        return;
      }
      Check(cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, bytes, call.streams,
                              cudaMemcpyDeviceToDevice, stream),
            "moving the rows of a step");
    };
    for (size_t i = 0; i < plan_.inputs.size(); ++i) {
      const int64_t bytes = InputBytes(i);
      const char* const from =
          inputs[i] < 0 ? static_cast<const char*>(call.inputs[i]) : staged_.get() + inputs[i];
      move(graph.values[plan_.inputs[i].value], bytes, from + t * bytes, call.steps * bytes, bytes);
    }
    move(step_.get() + layout.key_mask, 1, staged_.get() + key_mask + t, call.steps, 1);
    TakeStep(graph);
    for (size_t i = 0; i < plan_.outputs.size(); ++i) {
      if (call.outputs[i] == nullptr) continue;
      const int64_t bytes = OutputBytes(i);
      char* const to =
          outputs[i] < 0 ? static_cast<char*>(call.outputs[i]) : staged_.get() + outputs[i];
      move(to + t * bytes, call.steps * bytes,
           graph.values[compiled_.storage[plan_.outputs[i].value]], bytes, bytes);
    }
  }
  if (end > sent) {
    Check(cudaMemcpyAsync(received_.get(), staged_.get() + sent, end - sent, cudaMemcpyDeviceToHost,
                          stream),
          "copying outputs");
  }
  Check(cudaStreamSynchronize(stream), "taking steps");
  for (size_t i = 0; i < plan_.outputs.size(); ++i) {
    if (outputs[i] < 0) continue;
    std::memcpy(call.outputs[i], received_.get() + outputs[i] - sent, rows * OutputBytes(i));
  }
  // One long recording must not hold gigabytes of pinned memory for the session's life.
  constexpr int64_t kKept = 64 << 20;
  for (GpuBytes* memory : {&sent_, &received_, &staged_}) {
    if (memory->bytes() > kKept) *memory = GpuBytes();
  }
}

void DeviceArena::BeginProfile() {
  profiles_ = true;
  seconds_.assign(compiled_.entries.size(), 0);
}

const std::vector<double>& DeviceArena::EndProfile() {
  profiles_ = false;
  return seconds_;
}

}  // namespace continual_transformers
