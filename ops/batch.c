#include "ops/batch.h"

static const int32_t none[1] = {0};

const qv_batch qv_empty_batch = {.token = none,
                                 .pos = none,
                                 .seq_start = none,
                                 .state_slot = none,
                                 .logit_row = none,
                                 .seg_start = none,
                                 .seg_slot = none,
                                 .logit_seg_start = none,
                                 .logit_seg_slot = none};
