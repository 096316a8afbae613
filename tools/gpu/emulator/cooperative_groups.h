// The barriers of cooperative_groups that cuda/ uses; see cuda_runtime.h. A cluster is all blocks
// of a launch.

#ifndef CONTINUAL_TRANSFORMERS_TESTS_GPU_EMULATOR_COOPERATIVE_GROUPS_H_
#define CONTINUAL_TRANSFORMERS_TESTS_GPU_EMULATOR_COOPERATIVE_GROUPS_H_

#include "cuda_runtime.h"

namespace cooperative_groups {

struct grid_group {
  using arrival_token = unsigned;
  arrival_token barrier_arrive() const { return cuda_emulator::Block::Running().ArriveAtGrid(); }
  void barrier_wait(arrival_token&& token) const {
    cuda_emulator::Block::Running().WaitForGrid(token);
  }
};
inline grid_group this_grid() { return {}; }

struct cluster_group {
  void barrier_arrive() const { cuda_emulator::Block::Running().ArriveAtCluster(); }
  void barrier_wait() const { cuda_emulator::Block::Running().WaitForCluster(); }
};
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups

#endif  // CONTINUAL_TRANSFORMERS_TESTS_GPU_EMULATOR_COOPERATIVE_GROUPS_H_
