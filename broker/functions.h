/* Functions: the text of broker/quiver.lua, verbs that people call in Redis with FCALL. The broker
 * loads it there when it connects.
 */
#ifndef QV_BROKER_FUNCTIONS_H
#define QV_BROKER_FUNCTIONS_H

extern const char qv_redis_functions[];

#endif
