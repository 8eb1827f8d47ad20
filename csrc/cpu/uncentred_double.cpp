#include "uncentred.h"
#include "wide.h"

namespace cmim::cpu::CMIM_VARIANT {

void uncentred_in_double(const Job& job, const Cluster& cluster, const Team& team, Workspace& ws) {
  if (job.centroids)
    run_wide<double, true, false>(job, cluster, team, ws);
  else if (has_own_upstreams(job))
    run_wide<double, false, true>(job, cluster, team, ws);
  else
    run_wide<double, false, false>(job, cluster, team, ws);
}

}  // namespace cmim::cpu::CMIM_VARIANT
