/* Controller: how many replicas demand asks for, and where they should move. Once a second it looks
 * at every group:
 *
 *   demand    requests at once at all brokers, waiting and running, smoothed. A worker counts as
 * busy with 70 % of its capacity; so many workers as that takes are the goal, within replicas and
 *             max_replicas of what is wanted. The goal grows at once, by no more than to the
 * double, and falls by one when demand has asked for clearly fewer for a while balance   when
 * workers have stopped coming and going, an adapter moves to a worker that suits it better by
 * rendezvous hashing and is emptier than where it is: loaded there first, then the surplus leaves.
 * Each move makes the pool more even, or suits better, so moves end
 *
 * Both load on free slots only, or in the place of an idle adapter that has more replicas than it
 * should, or that was loaded on request and is in little demand; and only a few at a time. Pure;
 * the broker's thread.
 */
#ifndef QV_BROKER_CONTROLLER_H
#define QV_BROKER_CONTROLLER_H

#include "broker/placement.h"

/* Once a second. */
void qv_controller_tick(qv_placement *placement, uint64_t now_us);

/* Replicas that so much demand asks for on workers of this mean capacity, seen from a goal: what
 * lies within the hysteresis keeps it. */
int64_t qv_controller_goal(double demand, double capacity, int64_t goal);

#endif
