#include "uncentred.h"
#include "wide.h"

namespace cmim::cpu::CMIM_VARIANT {

bool uncentred_in_float(const Job& job, const Cluster& cluster, const Team& team, Workspace& ws) {
  if (job.centroids) return run_wide<float, true, false>(job, cluster, team, ws);
  return run_wide<float, false, false>(job, cluster, team, ws);
}

}  // namespace cmim::cpu::CMIM_VARIANT
