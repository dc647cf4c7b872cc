// Attention from queries to several streams of tokens on the CPU, each stream with a softmax of its own:
// o = sum_s gate_s softmax(rms(q) w . k_s^T / sqrt(D)) v_s, all streams in one pass.
#pragma once

#include <cstdint>
#include <vector>

#include "lanes.h"

namespace semantica {

// where the rows of one tensor [batch, length, heads, dim] lie, in values; those of a row are dense
struct Strides {
    int64_t batch, row, head;
};

struct CrossAttentionShape {
    int64_t batch, queries, heads, dim;
    // tokens of each stream
    std::vector<int64_t> sizes;
    Strides q, k, v;
    // of q, k, v and o; false: fp32
    bool bfloat16;
    int threads;
    Target target;
};

#ifdef SEMANTICA_LANES
// o [batch, queries, heads, dim] dense; lse [batch, heads, streams, queries] or null; lengths [batch, streams] or null for
// all tokens; gates [batch, streams, heads] or null for 1; q_weight [dim] or null for no norm. The last three are fp32.
void cross_attention_forward(const CrossAttentionShape& shape, const void* q, const void* k, const void* v, void* o,
                             float* lse, const int64_t* lengths, const float* gates, const float* q_weight);

bool cross_attention_runs(Target target);
#endif

}  // namespace semantica
