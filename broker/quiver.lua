#!lua name=quiver
-- Verbs over Quiver's keys, checked: each looks whether what it names is there, changes quiver:want or
-- quiver:drain as a person would with HSET, and adds to quiver:events. Brokers load this library when
-- they connect; by hand: redis-cli -x FUNCTION LOAD REPLACE < quiver.lua
-- Keys are made from names, so this is for a single server or Sentinel, not for Redis Cluster.
--
-- Redis does not tell a function who calls it. A caller says so with the one key that a verb takes,
-- quiver:who:NAME, which is never read or written: whom ACL rules allow only his own such key can use no
-- other name. Without a key the event says 'fcall'.

local HELP = {
  'FCALL quiver_move 0 ADAPTER FROM TO      move a replica from one worker to another',
  'FCALL quiver_drain 0 ID [WHY]            a worker or broker takes nothing new and finishes',
  'FCALL quiver_undrain 0 ID                and takes requests again',
  'FCALL quiver_pin 0 ADAPTER [0]           keep it in its slot; with 0 no longer',
  'FCALL quiver_replicas 0 ADAPTER N [MAX]  at least N replicas, at most MAX (0 = as demand asks)',
  'FCALL quiver_split 0 NAME A W [B W ...]  requests for NAME go to A, B ... by weight',
  'FCALL quiver_split 0 NAME                they go to NAME itself again',
  'FCALL quiver_... 1 quiver:who:NAME ...   any of these, with NAME as who did it in quiver:events',
  'FCALL quiver_help 0                      this text',
}

local function fail(...)
  return redis.error_reply('ERR ' .. table.concat({...}, ''))
end

local who -- calls the verb that runs

local function event(what, adapter, worker, why)
  local now = redis.call('TIME')
  local fields = {'who', who, 'what', what}
  local function add(name, value)
    if value then
      fields[#fields + 1] = name
      fields[#fields + 1] = value
    end
  end
  add('adapter', adapter)
  add('worker', worker)
  add('why', why)
  add('at_ms', string.format('%.0f', tonumber(now[1]) * 1000 + math.floor(tonumber(now[2]) / 1000)))
  redis.call('XADD', 'quiver:events', 'MAXLEN', '~', '10000', '*', unpack(fields))
end

local function want_key(adapter)
  return 'quiver:want:' .. adapter
end

local function is_wanted(adapter)
  return redis.call('EXISTS', want_key(adapter)) == 1
end

local function is_whole(text, least, most)
  local n = text and string.match(text, '^%d+$') and tonumber(text)
  return n ~= nil and n ~= false and n >= least and n <= most
end

local function usage(i)
  return fail('usage: ', HELP[i])
end

local function contains(list, value)
  for _, item in ipairs(list) do
    if item == value then return true end
  end
  return false
end

-- The workers that a want names; without any, those that hold the adapter now.
local function workers_of(adapter)
  local list = {}
  local text = redis.call('HGET', want_key(adapter), 'workers')
  if text then
    for id in string.gmatch(text, '[^, \t]+') do list[#list + 1] = id end
  end
  if #list == 0 then list = redis.call('HKEYS', 'quiver:place:' .. adapter) end
  table.sort(list)
  return list
end

local function move(args)
  local adapter, from, to = args[1], args[2], args[3]
  if #args ~= 3 then return usage(1) end
  if not is_wanted(adapter) then return fail('nobody wants adapter ', adapter) end
  if redis.call('HEXISTS', 'quiver:place:' .. adapter, from) == 0 then
    return fail('worker ', from, ' does not hold adapter ', adapter)
  end
  local state = redis.call('HGET', 'quiver:worker:' .. to, 'state')
  if not state then return fail('there is no worker ', to) end
  if state == 'draining' or redis.call('EXISTS', 'quiver:drain:' .. to) == 1 then
    return fail('worker ', to, ' is draining')
  end
  if redis.call('HEXISTS', 'quiver:place:' .. adapter, to) == 1 then
    return fail('worker ', to, ' holds adapter ', adapter, ' already')
  end
  local list = {}
  for _, id in ipairs(workers_of(adapter)) do
    if id ~= from and id ~= to then list[#list + 1] = id end
  end
  list[#list + 1] = to
  local workers = table.concat(list, ',')
  redis.call('HSET', want_key(adapter), 'workers', workers)
  event('adapter_moved', adapter, to, 'from ' .. from .. '; it may be on ' .. workers)
  return 'workers ' .. workers
end

local function drain(args)
  local id, why = args[1], args[2] or 'asked for'
  if #args < 1 or #args > 2 then return usage(2) end
  if redis.call('EXISTS', 'quiver:worker:' .. id, 'quiver:broker:' .. id) == 0 then
    return fail('there is no worker or broker ', id)
  end
  redis.call('HSET', 'quiver:drain:' .. id, 'why', why)
  event('drain_ordered', nil, id, why)
  return 'draining ' .. id
end

local function undrain(args)
  if #args ~= 1 then return usage(3) end
  if redis.call('DEL', 'quiver:drain:' .. args[1]) == 0 then
    return fail('nobody asked ', args[1], ' to drain')
  end
  event('drain_ended', nil, args[1])
  return 'not draining ' .. args[1]
end

local function pin(args)
  local adapter, value = args[1], args[2] or '1'
  if #args < 1 or #args > 2 or (value ~= '0' and value ~= '1') then return usage(4) end
  if not is_wanted(adapter) then return fail('nobody wants adapter ', adapter) end
  redis.call('HSET', want_key(adapter), 'pin', value)
  event('adapter_pinned', adapter, nil, 'pin ' .. value)
  return 'pin ' .. value
end

local function replicas(args)
  local adapter, n, most = args[1], args[2], args[3]
  if #args < 2 or #args > 3 or not is_whole(n, 0, 1024) or (most and not is_whole(most, 0, 1024)) then
    return usage(5)
  end
  if not is_wanted(adapter) then return fail('nobody wants adapter ', adapter) end
  most = most or redis.call('HGET', want_key(adapter), 'max_replicas') or '0'
  if tonumber(most) and tonumber(most) > 0 and tonumber(most) < tonumber(n) then
    return fail('max_replicas is ', most, ', below ', n)
  end
  redis.call('HSET', want_key(adapter), 'replicas', n, 'max_replicas', most)
  event('replicas_set', adapter, nil, n .. ' to ' .. (most == '0' and 'any number' or most))
  return 'replicas ' .. n .. ' max_replicas ' .. most
end

local function split(args)
  local name = args[1]
  if #args < 1 or #args % 2 == 0 or #args > 33 then return usage(6) end
  if #args == 1 then
    if redis.call('HEXISTS', want_key(name), 'path') == 0 then
      return fail(name, ' has no path of its own')
    end
    redis.call('HDEL', want_key(name), 'split')
    event('split_set', name, nil, 'to itself')
    return 'to itself'
  end
  local shares, total = {}, 0
  for i = 2, #args, 2 do
    local adapter, weight = args[i], args[i + 1]
    if not is_whole(weight, 0, 1000000) then
      return fail('the weight of ', adapter, ' is ', weight, ', not a number from 0 to 1000000')
    end
    if adapter ~= name and not is_wanted(adapter) then
      return fail('nobody wants adapter ', adapter)
    end
    if redis.call('HEXISTS', want_key(adapter), 'path') == 0 then
      return fail(adapter, ' has no path: an alias cannot stand for an alias')
    end
    total = total + tonumber(weight)
    shares[#shares + 1] = adapter .. '=' .. weight
  end
  if total == 0 then return fail('all weights are 0') end
  local text = table.concat(shares, ' ')
  redis.call('HSET', want_key(name), 'split', text)
  event('split_set', name, nil, text)
  return text
end

local function register(name, verb)
  redis.register_function(name, function(keys, args)
    local caller = keys[1] and string.match(keys[1], '^quiver:who:([%w._@+-]+)$')
    if #keys > 1 or (#keys == 1 and (caller == nil or #caller > 64)) then
      return fail('the one key that may be there is quiver:who:NAME with 1 to 64 letters, digits and . _ @ + -')
    end
    who = caller or 'fcall'
    return verb(args)
  end)
end

register('quiver_move', move)
register('quiver_drain', drain)
register('quiver_undrain', undrain)
register('quiver_pin', pin)
register('quiver_replicas', replicas)
register('quiver_split', split)
redis.register_function{function_name = 'quiver_help', callback = function() return HELP end,
                        flags = {'no-writes'}}
