#include "tests/emulate/thread_state.h"

#include "tests/emulate/machine.h"

namespace emu
{

thread_state &own_state()
{
    if (current->device == nullptr) {
        std::shared_ptr<thread_state> state = std::make_shared<thread_state>();
        state->self = state;
        current->device = state.get();
    }
    return *(thread_state *)current->device;
}

void thread_ended(thread *t)
{
    thread_state *state = (thread_state *)t->device;
    if (!state->products.empty())
        fail("the thread has ended with %zu products of wgmma under way", state->products.size());
    if (!state->stores.empty())
        fail("the thread has ended with stores of the copy engine that it has not waited for");
    t->device = nullptr;
    state->self.reset();
}

} // namespace emu
