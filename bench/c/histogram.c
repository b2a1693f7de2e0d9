#include "histogram.h"

#include <stddef.h>

void histogram_add(struct histogram *histogram, uint64_t value_ns)
{
    unsigned shift = value_ns < 128 ? 0 : 57 - (unsigned)__builtin_clzll(value_ns);
    histogram->counts[shift * 64 + (value_ns >> shift)]++;
    histogram->total++;
}

double histogram_ms(const struct histogram *histogram, double quantile)
{
    uint64_t below = (uint64_t)(quantile * (double)histogram->total), seen = 0;
    size_t size = sizeof histogram->counts / sizeof *histogram->counts;
    for (size_t bucket = 0; bucket < size; bucket++) {
        seen += histogram->counts[bucket];
        if (seen > below || (seen && seen == histogram->total)) {
            unsigned shift = bucket < 128 ? 0 : (unsigned)(bucket / 64) - 1;
            uint64_t low = (uint64_t)(bucket - shift * 64) << shift;
            return ((double)low + (double)(1ULL << shift) / 2) / 1e6;
        }
    }
    return 0;
}
