// Clusters of blocks, as csrc/cuda/cluster.cuh passes them on. Included by simt.h.
#pragma once
#include <source_location>

#include "simt.h"

namespace simt {

unsigned cluster_rank();  // of this block
unsigned cluster_size();
// Waits for all threads of the cluster, and makes their writes visible to each other.
void cluster_sync(std::source_location where = std::source_location::current());
// What `mine`, in shared memory, is in the block of this rank. That block has to have started, and must not
// have returned when the memory is used: there is a barrier of the cluster before the call and after it.
void* map_shared(void* mine, unsigned rank, std::source_location where);
template <class X>
X* peer_shared(X* mine, unsigned rank, std::source_location where = std::source_location::current()) {
  return static_cast<X*>(map_shared(mine, rank, where));
}
// How many clusters of a launch run at once.
int max_clusters();

}  // namespace simt
