/* List: an intrusive doubly linked list. A node lies inside its item and is in one list at most;
 * the list owns nothing. Any thread that owns the items.
 *
 *     QV_LIST_EACH (&pool->members, qv_member, link, member) { ... }
 *
 * The body may remove the current item and no other.
 */
#ifndef QV_BROKER_LIST_H
#define QV_BROKER_LIST_H

#include <stdbool.h>
#include <stddef.h>

typedef struct qv_list {
    struct qv_list *prev, *next; /* NULL in an item that is in no list */
} qv_list;

#define QV_LIST_ITEM(node, type, field) ((type *)(void *)((char *)(node)-offsetof(type, field)))

#define QV_LIST_EACH(list, type, field, item)                                                      \
    for (type *item = QV_LIST_ITEM((list)->next, type, field),                                     \
              *item##_next = QV_LIST_ITEM(item->field.next, type, field);                          \
         &item->field != (list);                                                                   \
         item = item##_next, item##_next = QV_LIST_ITEM(item->field.next, type, field))

/* Make an empty list of a head. */
static inline void qv_list_init(qv_list *list)
{
    list->prev = list->next = list;
}

static inline bool qv_list_is_empty(const qv_list *list)
{
    return list->next == list;
}

/* Whether a node is in some list. */
static inline bool qv_list_has(const qv_list *node)
{
    return node->next != NULL;
}

/* Add at the end of a list. */
static inline void qv_list_append(qv_list *list, qv_list *node)
{
    node->prev = list->prev;
    node->next = list;
    list->prev->next = node;
    list->prev = node;
}

/* Take a node out of its list; a node that is in none stays so. */
static inline void qv_list_remove(qv_list *node)
{
    if (node->next == NULL)
        return;
    node->prev->next = node->next;
    node->next->prev = node->prev;
    node->prev = node->next = NULL;
}

#endif
