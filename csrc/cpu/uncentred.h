// A cluster from its logits as they are, compiled once per variant and arithmetic.
#pragma once

#include "problem.h"

namespace cmim::cpu::CMIM_VARIANT {

// Returns false, with no gradient written, where float does not resolve the cluster. Not for a job that
// has_own_upstreams().
bool uncentred_in_float(const Job& job, const Cluster& cluster, const Team& team, Workspace& ws);
void uncentred_in_double(const Job& job, const Cluster& cluster, const Team& team, Workspace& ws);

}  // namespace cmim::cpu::CMIM_VARIANT
